"""The faults in the method that `run.py` puts in: for each file, the tests that should notice, and the changes.

A change is (text, what replaces it), or (text, what replaces it, why no test can notice it).
"""

from __future__ import annotations

from typing import Any

MERGES = ("tests/pca/test_merge_and_state.py", "tests/pca/test_properties.py")

FAULTS: dict[str, tuple[tuple[str, ...], list[Any]]] = {
    "pca/moments.py": (
        (
            "tests/pca/test_moments.py",
            "tests/pca/test_oracle.py",
            *MERGES,
        ),
        [
            ("wide_nd.square().sum(dim=0)", "wide_nd.abs().sum(dim=0)"),
            ("dim=0, dtype=dtype).square()", "dim=0, dtype=dtype)"),
            ("rows_nd.sum(dim=0, dtype=dtype), torch", "rows_nd.sum(dim=0), torch"),
            ("rounded(shift_d) if is_half else shift_d", "shift_d"),
            ("if self.is_rounded and rows_nd.dtype", "if rows_nd.dtype"),
            ("return rows_nd - shift_d.to(wanted)", "return rows_nd"),
            ("rows_nd.to(shift_d.dtype)) - shift_d", "rows_nd.to(shift_d.dtype))"),
            ("is_rounded=self.is_rounded)", "is_rounded=True)"),
            ("is_rounded=torch.equal(rounded(shift_d), shift_d)", "is_rounded=False"),
            ("self.sum_d / max(self.n_rows, 1)", "self.sum_d / max(self.n_rows - 1, 1)"),
            ("return self.shift_d + self.offset_d", "return self.shift_d - self.offset_d"),
            ("squares_d - n_rows * (sum_d / max(n_rows, 1)).square()", "squares_d"),
            ("torch.where(spread_d < rounding_d, 0.0, spread_d)", "spread_d.clamp_min(0.0)"),
            ("return spread_d / max(n_rows - 1, 1)", "return spread_d / max(n_rows, 1)"),
            ("+ 2 * move_d * self.sum_d", "+ move_d * self.sum_d"),
            ("sum_d=self.sum_d + self.n_rows * move_d", "sum_d=self.sum_d + move_d"),
            ("n_rows=self.n_rows + theirs.n_rows", "n_rows=self.n_rows"),
        ],
    ),
    "pca/streaming.py": (
        (
            *MERGES,
            "tests/pca/test_oracle.py",
            "tests/pca/test_leading.py",
            "tests/pca/test_awkward_rows.py",
            "tests/pca/test_exact.py",
        ),
        [
            ("= state is None or state.needs_full_precision", "= False"),
            ('missing.") from None\n        self._forget()', 'missing.") from None'),
            ("tensor.detach().clone().contiguous() for", "tensor.detach().contiguous() for"),
            ("name: tensor.clone() if device is None", "name: tensor if device is None"),
            ("product_dtype=product_dtype)\n        self._forget()", "product_dtype=product_dtype)"),
            ("return self.partial_fit(rows)\n", "return self\n"),
            ("return centred_nd @ components_kd", "return rows @ components_kd"),
            ("if center != self.center:", "if False:"),
            ("if not state.keeps_all and state.n_components > n_kept:", "if False:"),
        ],
    ),
    "pca/exact.py": (
        (
            "tests/pca/test_exact.py",
            "tests/pca/test_oracle.py",
            *MERGES,
            "tests/pca/test_sketch.py",
        ),
        [
            ("alpha=-self.moments.n_rows)", "alpha=1.0)"),
            (
                "needs_full_precision=self.needs_full_precision or other.needs_full_precision",
                "needs_full_precision=self.needs_full_precision",
            ),
            ("missed=self._missed + other._missed", "missed=self._missed"),
            ("cross_dd + cross_dd.T + theirs.n_rows", "cross_dd + theirs.n_rows"),
            ("theirs.n_rows * torch.outer(move_d, move_d)", "torch.outer(move_d, move_d)"),
            ("            self.second_moment_dd.zero_()\n", ""),
            ("return self.moments.n_rows >= 2 * self.n_rows_reviewed", "return False"),
            ('missed=float(tensors["missed"])', "missed=0.0"),
            ("energies_k -= self.moments.n_rows *", "energies_k -="),
        ],
    ),
    "pca/sketch.py": (
        (
            "tests/pca/test_sketch.py",
            *MERGES,
            "tests/pca/test_oracle.py",
        ),
        [
            ("            images_ds += moments.n_rows * torch.outer(offset_d, offset_d @ probes_ds)\n", ""),
            ("            images_ds += weight * torch.outer(difference_d, difference_d @ probes_ds)\n", ""),
            ("images_ds += solver_copy(alone(other._about_mean(slice(other.width, None)))[1])", "images_ds += 0"),
            ("wider = self if self.width >= other.width else other", "wider = self"),
            ("row_times(offset_d, test_dl), weight=n_rows)", "row_times(offset_d, test_dl), weight=1)"),
            ("row_times(offset_d, columns_dm), weight=-n_rows)", "row_times(offset_d, columns_dm), weight=0)"),
            ("few = SETTLED * self.n_components**2 / self.moments.n_rows if", "few = 0.0 if"),
            ("leading_dk -= leading_dk @", "leading_dk -= 0 * leading_dk @"),
            ("return self.moments.n_rows >= 2 * self.n_rows_refreshed", "return False"),
            ("pairs, missed=missed)", "pairs, missed=0.0)"),
        ],
    ),
    "pca/together.py": (
        (
            "tests/pca/test_together.py",
            "tests/pca/test_many.py",
        ),
        [
            ("return self.function, self.settings, *(", "return self.function, *("),
            ("if waiting[numbers[0]].makes_wait and not must_wait:", "if False:"),
            ("if len(requests) == 1 or requests[0].tensors[0].device.type in OWN_MEMORY:", "if True:"),
        ],
    ),
    "pca/probes.py": (
        (
            "tests/pca/test_sketch.py",
            "tests/pca/test_probes.py",
            "tests/activations/test_waiting.py",
        ),
        [
            ("n_half = (missed_k.shape[-1] + 1) // 2", "n_half = missed_k.shape[-1]"),
            ("if n_pairs < width:", "if False:"),
            ("values_k[..., None] * (vectors_dk.mT @ probes_ds)", "values_k[..., None] * probes_ds[:1]"),
            ("noise > RESIDUAL_NOISE * smallest", "noise > smallest"),
            ("(values_p[..., 0] > MASSIVE_RATIO * values_p[..., -1])", "False"),
        ],
    ),
    "pca/eigen.py": (
        (
            "tests/pca/test_eigen.py",
            "tests/pca/test_exact.py",
        ),
        [
            ("<= tolerance) & ~turned_k.any()", "<= tolerance)"),
            ("residual_k.square() / torch.maximum", "residual_k / torch.maximum"),
            ("(core_ll + core_ll.T) / 2", "core_ll * 2"),
        ],
    ),
    "pca/subspace.py": (
        (
            "tests/pca/test_subspace.py",
            "tests/pca/test_oracle.py",
        ),
        [
            ("argmax(dim=-1, keepdim=True)", "argmin(dim=-1, keepdim=True)"),
            ("random = random - basis_dl @ (basis_dl.T @ random)", "random = random * 1.0"),
            ("(new_kd * old_kd).sum(dim=1).abs()", "(new_kd * old_kd).sum(dim=1)"),
        ],
    ),
    "pca/nystrom.py": (
        (
            "tests/pca/test_nystrom.py",
            "tests/pca/test_sketch.py",
        ),
        [
            ("/ 2 * scale_m[..., None, :] * scale_m[..., None]", "/ 2"),
            ("    if is_spread:\n", "    if False:\n"),
        ],
    ),
    "pca/one_hot.py": (
        (
            "tests/pca/test_one_hot.py",
            "tests/pca/test_leading.py",
        ),
        [
            ("d_u * size_double_u.sqrt()", "d_u * size_double_u"),
            ("energies_k - sums_k.square() / self._n_rows if self.center", "energies_k if self.center"),
            ("row_v /= (j * (j + 1)) ** 0.5", "row_v /= (j * (j + 1))"),
            ("scatter = n - counts_v.square().sum() / n if self.center else n", "scatter = n"),
            ("result._n_rows = self._n_rows + other._n_rows", "result._n_rows = self._n_rows"),
        ],
    ),
    "pca/stacked.py": (
        (
            "tests/activations/layers/test_experts.py",
            "tests/activations/layers/test_layer_types.py",
            "tests/pca/test_leading.py",
        ),
        [
            ("torch.cat(pieces, dim=1) / len(self.parts) ** 0.5", "torch.cat(pieces, dim=1)"),
            ("squares_k[: len(values)] += values.square()", "squares_k[: len(values)] += values"),
            ("if self.alike and not is_fed:", "if self.alike:"),
        ],
    ),
    "pca/products.py": (
        (
            "tests/pca/test_products.py",
            "tests/pca/test_exact.py",
        ),
        [
            ("weighted_ks[:, :start] *= 2", "weighted_ks[:, :start] *= 1"),
            ("2 * total_dd[start:stop, :start].square().sum()", "total_dd[start:stop, :start].square().sum()"),
        ],
    ),
    "pca/incremental.py": (
        (
            "tests/pca/test_incremental.py",
            "tests/pca/test_oracle.py",
        ),
        [
            ("weight = (n_before * n_batch / n_rows) ** 0.5", "weight = n_before * n_batch / n_rows"),
            ("torch.cat([shifted_nd - batch_mean_d, correction_1d])", "shifted_nd - batch_mean_d"),
        ],
    ),
    "pca/backend.py": (
        (
            *MERGES,
            "tests/pca/test_sketch.py",
        ),
        [
            ("mine.n_rows * theirs.n_rows / max", "(mine.n_rows + theirs.n_rows) / max"),
            ("if first.center and first.moments.n_rows", "if first.moments.n_rows"),
        ],
    ),
    "allocation.py": (
        (
            "tests/test_allocation.py",
            "tests/test_budget.py",
        ),
        [
            ("return target.explained_variance / target.total_variance", "return target.explained_variance"),
            ("* (target.n_rows - 1))", "* target.n_rows)"),
            ("target.explained_variance / target.explained_variance.max()", "target.explained_variance"),
            ("target.explained_variance / target.explained_variance.sum()", "target.explained_variance"),
            ("min(max_components(base_ranks[name], rho), target.in_features)", "max_components(base_ranks[name], rho)"),
            ("np.lexsort((owner, component, -scores))", "np.lexsort((component, owner, -scores))"),
            ("* factors[name] / costs[name]", "* factors[name]"),
            ("float(min(share, 1.0))", "float(share)"),
            ("power = 0.5 if settings.use_rslora else 1.0", "power = 1.0"),
            ("if costs[name] <= available:", "if costs[name] < available:"),
            ("            available -= costs[name]\n", ""),
            ("np.minimum.accumulate(np.maximum(scores, 0.0))", "np.maximum(scores, 0.0)"),
            ("(in_features if train_a else 0) + out_features", "in_features + out_features"),
        ],
    ),
    "spectra.py": (
        (
            "tests/test_spectra.py",
            "tests/test_budget.py",
        ),
        [
            (
                "self.singular_values.square() / max(self.n_rows - 1, 1)",
                "self.singular_values.square() / max(self.n_rows, 1)",
            ),
            (
                "            return torch.zeros_like(self.singular_values)\n",
                "            return torch.ones_like(self.singular_values)\n",
            ),
        ],
    ),
    "files.py": (
        ("tests/test_files.py",),
        [
            ("if path.exists() and not overwrite:", "if False:"),
            ("not (path / holds).is_file():", "False:"),
            ("        shutil.rmtree(temporary, ignore_errors=True)", "        pass"),
        ],
    ),
    "tables.py": (
        ("tests/test_tables.py",),
        [
            ('return f"{value:,}"', 'return f"{value}"'),
            ('return cell.rjust(width) if how == "r"', 'return cell.ljust(width) if how == "r"'),
            ("    if value is None:\n        return _MISSING", '    if value is None:\n        return ""'),
        ],
    ),
    "initialization/eva.py": (
        ("tests/initialization/test_eva.py",),
        [
            (
                "components_kd[:rank].detach().clone(memory_format=torch.contiguous_format)",
                "components_kd[:rank].detach()",
            ),
            ("[:rank].sqrt().unsqueeze(1)", "[:rank].unsqueeze(1)"),
            ("if not 0 <= rank <= k:", "if not 0 <= rank:"),
        ],
    ),
    "initialization/eva_minor.py": (
        ("tests/initialization/test_ablations.py",),
        [
            ("components_kd[d - rank :].flip(0)", "components_kd[:rank].flip(0)"),
        ],
    ),
    "initialization/lora_one.py": (
        ("tests/initialization/test_lora_one.py",),
        [
            ("(-U[:, :rank] * root_r)", "(U[:, :rank] * root_r)"),
            ("step / scaling * S[:rank] / S[0]", "step * S[:rank] / S[0]"),
        ],
    ),
    "initialization/milora.py": (
        ("tests/initialization/test_milora.py",),
        [
            ("(S[-rank:] / scaling).sqrt()", "S[-rank:].sqrt()"),
            ("root_r.unsqueeze(1) * Vh[-rank:]", "root_r.unsqueeze(1) * Vh[:rank]"),
        ],
    ),
    "initialization/scramble.py": (
        ("tests/initialization/test_ablations.py",),
        [
            ("Q_rr = Q_rr * R_rr.diagonal().sign()", "Q_rr = Q_rr * 1.0"),
            ('device="cpu").argsort(dim=0)', 'device="cpu").argsort(dim=1) % len(A_rd)'),
            ("- 1) / in_features**0.5", "- 1)"),
        ],
    ),
    "activations/stopping.py": (
        ("tests/activations/test_stopping.py",),
        [
            ("if share >= rule.delta:", "if share > 0:"),
            ("found.n_rows >= ENOUGH_ROWS", "found.n_rows >= 0"),
            ("(now - then) / now if now > 0 else 0.0", "(now - then) if now > 0 else 0.0"),
            ("state.gain < rule.min_gain:", "state.gain > rule.min_gain:"),
            ("/ found.n_processes", ""),
        ],
    ),
    "activations/layers/convolution.py": (
        ("tests/activations/layers/test_layer_types.py",),
        [
            (
                "module.in_channels // module.groups * prod(module.kernel_size), module.out_channels",
                "module.in_channels * prod(module.kernel_size), module.out_channels",
            ),
            (
                "for total in reversed(totals) for n in (total // 2, total - total // 2)",
                "for total in totals for n in (total // 2, total - total // 2)",
            ),
            ("stride)[..., ::dilation]", "stride)"),
        ],
    ),
    "adapters/factors.py": (
        (
            "tests/adapters/test_factors.py",
            "tests/adapters/test_layer_types.py",
            "tests/adapters/test_export.py",
        ),
        [
            (".transpose(0, 1) * n_experts**0.5", ".transpose(0, 1)"),
            ("            setattr(module, size, rank)", "            pass"),
            (
                "return _grown(down_erd, 1, rank).flatten(0, 1), _grown(up * scale",
                "return _grown(down_erd, 1, rank).flatten(0, 1), _grown(up",
            ),
        ],
    ),
    "adapters/lora.py": (
        (
            "tests/adapters/test_initialize.py",
            "tests/adapters/test_layer_types.py",
            "tests/adapters/test_all_or_nothing.py",
            "tests/adapters/test_unloading.py",
        ),
        [
            ("piece_rd * len(pairs) ** 0.5", "piece_rd"),
            ("alpha / math.sqrt(rank) if use_rslora else alpha / rank", "alpha / rank"),
            ("part.lora_alpha[adapter_name] = alpha", "pass"),
            ("                targeted.remove(name)", "                pass"),
            ("                bias.requires_grad_(False)", "                pass"),
        ],
    ),
    "adapters/config.py": (
        ("tests/adapters/test_config.py",),
        [
            ('f"^{re.escape(name)}": value', 'f"{re.escape(name)}": value'),
            ("if value != default}", "}"),
            ("planned.init_lora_weights = True", "pass"),
            ("planned = copy.copy(config)", "planned = config"),
            ('regexes = [rf"(.*\\.)?{re.escape(ending)}"', "regexes = [re.escape(ending)"),
        ],
    ),
    "adapters/export.py": (
        ("tests/adapters/test_export.py",),
        [
            ("portable.use_rslora = False", "pass"),
            ("tensors[bias] = tensors[bias] * scale", "pass"),
            ("if config.init_lora_weights not in _BASE_UNTOUCHED:", "if False:"),
        ],
    ),
    "adapters/base_change.py": (
        ("tests/adapters/test_prepare.py",),
        [
            ("-B0.to(tensors[up])", "B0.to(tensors[up])"),
            ("(2**0.5 if config.use_rslora else 2)", "2"),
            ("(original.to(product) - product)", "original.to(product)"),
        ],
    ),
    "activations/capture.py": (
        ("tests/activations/test_preserve.py",),
        [
            (
                "            handle.remove()\n        self._handles.clear()",
                "            pass\n        self._handles.clear()",
            )
        ],
    ),
    "activations/from_disk/blockwise.py": (
        ("tests/activations/from_disk/test_blockwise.py",),
        [("if call.block != name:", "if False:")],
    ),
    "adapters/fit.py": (
        ("tests/training/test_planned.py", "tests/adapters/test_fit.py"),
        [
            ("if rank > n_kept:", "if rank > n_kept + 1:"),
            ("if plan.use_rslora != use_rslora:", "if False:"),
        ],
    ),
}

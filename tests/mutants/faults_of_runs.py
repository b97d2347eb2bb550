"""The faults in what surrounds the method: settings, models, tasks, training, comparisons; see `faults.py`."""

from __future__ import annotations

from typing import Any

FAULTS: dict[str, tuple[tuple[str, ...], list[Any]]] = {
    "training/arguments.py": (
        ("tests/training/test_arguments.py",),
        [
            ('"weight_decay": settings.weight_decay', '"weight_decay": 0.0'),
            ('"max_grad_norm": settings.max_grad_norm', '"max_grad_norm": 1.0'),
            ('"data_seed": settings.seed', '"data_seed": 0'),
            ("math.ceil(settings.warmup_ratio * n_steps)", "math.floor(settings.warmup_ratio * n_steps)"),
        ],
    ),
    "interruption.py": (
        ("tests/training/test_interrupt.py", "tests/test_interruption.py"),
        [("signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)", "pass")],
    ),
    "models/kinds.py": (
        ("tests/tasks/test_tasks.py",),
        [('and not getattr(config, "is_decoder", False)', "and False")],
    ),
    "training/trainer.py": (
        ("tests/training/test_extend.py", "tests/training/test_finetune.py"),
        [
            ("schedule.last_epoch -= 1", "pass"),
            ("if self.state.global_step < self.state.max_steps:", "if True:"),
        ],
    ),
    "training/folder.py": (
        ("tests/training/test_folder.py", "tests/training/test_extend.py"),
        [
            ("if max(steps, default=0) > n_steps:", "if max(steps, default=0) > n_steps + 1:"),
            ("key=checkpoint_step, reverse=True)", "reverse=True)"),
            ("if key not in free and", "if 'data.eval' not in key and key not in free and"),
        ],
    ),
    "training/schedule.py": (
        ("tests/training/test_schedule.py",),
        [
            ("return step / n_warmup", "return (step - 1) / n_warmup"),
            ("0.5 * (1.0 + math.cos(math.pi * done))", "(1.0 + math.cos(math.pi * done))"),
        ],
    ),
    "training/layerwise.py": (
        ("tests/training/test_layerwise.py",),
        [
            ("decay ** (top - depth)", "decay ** depth"),
            ("weight_decay if is_matrix else 0.0", "weight_decay"),
        ],
    ),
    "tasks/generation/encoding.py": (
        ("tests/tasks/generation/test_encoding.py",),
        [
            ("(values[:1] + values[1 + cut :])[:max_length]", "values[:max_length]"),
            (
                'padded([[1] * len(row["input_ids"]) for row in rows], 0)',
                'padded([[1] * len(row["input_ids"]) for row in rows], 1)',
            ),
            ("learned[end - 1]) else IGNORED", "learned[start]) else IGNORED"),
        ],
    ),
    "tasks/statistics.py": (
        ("tests/tasks/test_statistics.py", "tests/tasks/test_scores.py"),
        [
            (
                "np.sum(above_n, axis=axis) / np.maximum(np.sum(below_n, axis=axis), 1e-300)",
                "np.mean(above_n / below_n, axis=axis)",
            ),
            ("agree - chance, 0)", "agree, 0)"),
            ("first + right**2", "first + right"),
        ],
    ),
    "tasks/understanding/classification.py": (
        ("tests/tasks/understanding/test_glue.py", "tests/tasks/understanding/test_classification.py"),
        [
            ("if label in HIDDEN:", 'if label == "-1":'),
            ("sorted(names, key=int)", "sorted(names)"),
        ],
    ),
    "tasks/understanding/token_classification.py": (
        ("tests/tasks/understanding/test_token_classification.py",),
        [("bisect_right(starts, begin + blank) - 1", "bisect_right(starts, begin) - 1")],
    ),
    "tasks/understanding/entities.py": (
        ("tests/tasks/understanding/test_token_classification.py",),
        [(" and tag[0] not in _BEGINS", "")],
    ),
    "tasks/understanding/question_answering.py": (
        ("tests/tasks/understanding/test_question_answering.py",),
        [("none > score else text", "none < score else text")],
    ),
    "tasks/understanding/answers.py": (
        ("tests/tasks/understanding/test_question_answering.py",),
        [(".triu().tril", ".tril"), ("2 * shared /", "shared /")],
    ),
    "settings/section.py": (
        (
            "tests/settings/test_section.py",
            "tests/settings/test_measuring.py",
            "tests/test_recipe.py",
        ),
        [
            ('"below": (operator.lt, "less than")', '"below": (operator.le, "less than")'),
            ('return value.lower() in ("true", "yes")', 'return value.lower() == "true"'),
            ("if not math.isfinite(read) or", "if"),
        ],
    ),
    "compare/statistics.py": (
        ("tests/compare/test_statistics.py",),
        [
            ("cut = len(ordered) // 4", "cut = len(ordered) // 10"),
            ("if any(len(task) < 2 for method", "if any(len(task) < 1 for method"),
            ("[rng.choice(task, len(task)) for task in method]", "[rng.permutation(task) for task in method]"),
            (" / 2 + 0.5) for ours", " / 2 + 0.4) for ours"),
            ("chosen = rng.integers(len(pairs), size=len(pairs))", "chosen = range(len(pairs))"),
            ("p=min(1.0, 2 * (float(tail)", "p=min(1.0, (float(tail)"),
            ("(len(p_values) - place) * p_values[index]", "len(p_values) * p_values[index]"),
            ("largest = max(largest, min(", "largest = max(0.0, min("),
            ("stats.rankdata(-table, axis=0)", "stats.rankdata(table, axis=0)"),
            ("/ (6 * n_blocks)", "/ (3 * n_blocks)"),
        ],
    ),
    "compare/choosing.py": (
        ("tests/compare/test_loop.py", "tests/compare/test_choosing.py"),
        [
            ("sign = 1 if is_better_higher", "sign = -1 if is_better_higher"),
            ("if not allowed or grown == widen:", "if True:"),
            ("open=tuple(ends)", "open=()"),
            ("if known and len(known) == len(scores)", "if known"),
            ("beyond = best * best / ordered[-2]", "beyond = best + ordered[-2]"),
        ],
    ),
    "compare/loop.py": (
        ("tests/compare/test_loop.py",),
        [
            ('if outcome.state == "died" and job.tries < sweep.tries:', 'if outcome.state == "died":'),
            ("if item[0].spectra_key not in measuring", "if True"),
            ("if free < LEAST_DISK:", "if False:"),
            ("left = None if limit is None else", "left = None if True else"),
        ],
    ),
    "compare/runs.py": (
        ("tests/compare/test_sweep.py",),
        [
            ("validation.data == test.data and not", "False and not"),
            ("if not test.train.eval_before:", "if False:"),
            ('"batch": recipe.measure.batch_size,', '"batch": recipe.train.learning_rate,'),
            ('"measuring": recipe.measuring.to_json(),', ""),
            (
                "if twice := next((folder for folder in folders if folders.count(folder) > 1), None):",
                "if twice := None:",
            ),
        ],
    ),
}

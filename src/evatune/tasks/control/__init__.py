"""Decision making: a Decision Transformer on Meta-World (Section 4.5 and Appendix E of the paper)."""

"""LLM.int8() in float64, from Dettmers et al. 2022, "LLM.int8()", sections 2.1 and 3, equations 1 and 8."""

from __future__ import annotations

import numpy as np


def outlier_columns(X: np.ndarray, threshold: float) -> np.ndarray:
    """O: the columns of X [M, K] with a magnitude of at least `threshold` somewhere."""
    return np.flatnonzero((np.abs(X.astype(np.float64)) >= threshold).any(axis=0))


def absmax_quantized(A: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes round(127 A / max|A|) and scales max|A| / 127, a scale for each slice along `axis` (equation 1)."""
    scale = np.abs(A).max(axis=axis, keepdims=True, initial=0.0) / 127
    scale[scale == 0] = 1.0
    return np.round(A / scale), scale


def vector_wise(X: np.ndarray, W: np.ndarray) -> np.ndarray:
    """S · (X_i8 W_i8) with S the outer product of the scales of X's rows and of W's columns."""
    rows, row_scales = absmax_quantized(X.astype(np.float64), axis=1)
    columns, column_scales = absmax_quantized(W.astype(np.float64), axis=0)
    return np.asarray((rows @ columns) * (row_scales * column_scales))


def product(X: np.ndarray, W: np.ndarray, threshold: float) -> np.ndarray:
    """Equation 8: Σ_{h ∈ O} X^h W_h in float, plus S · Σ_{h ∉ O} X_i8^h W_i8_h."""
    outliers = outlier_columns(X, threshold)
    others = np.setdiff1d(np.arange(X.shape[1]), outliers)
    exact = X[:, outliers].astype(np.float64) @ W[outliers].astype(np.float64)
    return np.asarray(exact + vector_wise(X[:, others], W[others]))


def predicted_error(X: np.ndarray, W: np.ndarray, threshold: float) -> float:
    """Expected ‖ŷ - y‖² of `product`, with rounding errors independent and uniform: variance step² / 12."""
    others = np.setdiff1d(np.arange(X.shape[1]), outlier_columns(X, threshold))
    X, W = X[:, others].astype(np.float64), W[others].astype(np.float64)
    _, row_scales = absmax_quantized(X, axis=1)
    _, column_scales = absmax_quantized(W, axis=0)
    from_rows = np.sum(row_scales**2) / 12 * np.sum(W**2)
    from_columns = np.sum(column_scales**2) / 12 * np.sum(X**2)
    return float(from_rows + from_columns)

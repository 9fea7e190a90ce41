//! The formats of `/metrics`.

use hyper::header::HeaderMap;
use kvs_metrics::{Metrics, open_metrics, text_format};

use crate::edge::accept;

/// Returns the metrics and their media type: in the text format 0.0.4 for clients that prefer it, and otherwise in the
/// OpenMetrics format.
pub fn of(metrics: &Metrics, headers: &HeaderMap) -> (String, &'static str) {
    let prefers_text = accept::quality(headers, text_format::NAME) > accept::quality(headers, open_metrics::NAME);
    if prefers_text {
        (text_format::from_open_metrics(&metrics.text()), text_format::MEDIA_TYPE)
    } else {
        (metrics.text(), open_metrics::MEDIA_TYPE)
    }
}

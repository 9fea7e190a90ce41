//! Content negotiation by `Accept`.

use hyper::header::{self, HeaderMap};

use super::head;

/// Returns the quality in thousandths with which a request accepts a media type by its name. Wildcards do not count.
pub fn quality(headers: &HeaderMap, media_type: &str) -> u16 {
    let accepts = head::values(headers, header::ACCEPT).filter_map(|accept| accept.to_str().ok());
    let qualities = accepts.flat_map(|accept| accept.split(',')).filter_map(|range| {
        let mut parts = range.split(';').map(str::trim);
        parts.next().filter(|name| name.eq_ignore_ascii_case(media_type))?;
        let quality = parts.find_map(|parameter| parameter.strip_prefix("q="));
        let quality = quality.map_or(1.0, |quality| quality.parse::<f32>().unwrap_or(1.0));
        Some((quality.clamp(0.0, 1.0) * 1e3) as u16)
    });
    qualities.max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use hyper::header::HeaderValue;

    use super::*;

    const NAME: &str = "application/problem+json";

    fn headers(accepts: &[&'static str]) -> HeaderMap {
        accepts.iter().map(|accept| (header::ACCEPT, HeaderValue::from_static(accept))).collect()
    }

    #[test]
    fn media_type_must_be_accepted_by_name() {
        for (accept, expected) in [
            ("application/problem+json", 1000),
            ("text/html, Application/Problem+JSON;q=0.5", 500),
            ("application/problem+json;charset=utf-8; q=0.25", 250),
            ("application/problem+json; q=0", 0),
            ("application/problem+json; q=0.000", 0),
            ("application/problem+json; q=NaN", 0),
            ("application/json", 0),
            ("*/*", 0),
            ("application/*", 0),
            ("", 0),
        ] {
            assert_eq!(quality(&headers(&[accept]), NAME), expected, "{accept}");
        }
        assert_eq!(quality(&HeaderMap::new(), NAME), 0);
        assert_eq!(quality(&headers(&["text/html", NAME]), NAME), 1000);
    }
}

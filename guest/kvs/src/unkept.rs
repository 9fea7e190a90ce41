//! Headers of a body that would change what the body means, and that are neither carried out nor kept.
//!
//! Owns: which of them are refused, and why. Ignored, a part of a value would replace the whole (`Content-Range`), and
//! bytes that were compressed would come back as if they were not (`Content-Encoding`).
//! Must never know: methods, or what becomes of the body.

use crate::answer::{header, line, with};
use crate::kvs::store::http::{Header, Response};

/// The headers to ask the host for.
pub const CONTENT_RANGE: &str = "content-range";
pub const CONTENT_ENCODING: &str = "content-encoding";
pub const CONTENT_LANGUAGE: &str = "content-language";
pub const CONTENT_DISPOSITION: &str = "content-disposition";
pub const CACHE_CONTROL: &str = "cache-control";

/// The response to a body with such headers, if it has any.
pub fn refusal(headers: &[Header]) -> Option<Response> {
    headers.iter().find_map(|Header { name, value }| match name.as_str() {
        // RFC 9110, section 14.5.
        CONTENT_RANGE => Some(line(400, "content-range: a part of a value cannot be put; send the whole value")),
        CONTENT_ENCODING if !every_element(value, |coding| coding.eq_ignore_ascii_case(b"identity")) => {
            let reason =
                "content-encoding would not be kept; send the value as it is, or name what it is in content-type";
            Some(with(line(415, reason), header("accept-encoding", "identity")))
        }
        CACHE_CONTROL if !every_element(value, is_of_request) => {
            Some(line(415, "cache-control would not be kept; send the value without it"))
        }
        CONTENT_LANGUAGE => Some(line(415, "content-language would not be kept; send the value without it")),
        CONTENT_DISPOSITION => Some(line(415, "content-disposition would not be kept; send the value without it")),
        _ => None,
    })
}

/// What browsers and caches send with every request on the way, and that says nothing of its body.
fn is_of_request(directive: &[u8]) -> bool {
    [&b"no-cache"[..], b"no-store", b"no-transform", b"max-age=0"].iter().any(|own| directive.eq_ignore_ascii_case(own))
}

/// Whether all elements of a list hold. One without any says nothing.
fn every_element(value: &[u8], holds: impl Fn(&[u8]) -> bool) -> bool {
    value.split(|byte| *byte == b',').map(<[u8]>::trim_ascii).all(|element| element.is_empty() || holds(element))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rest;
    use crate::store::Store;
    use crate::testing::{header_of, request, text_of, unasked};

    #[test]
    fn a_body_whose_headers_change_its_meaning_is_refused() {
        for (name, value, status) in [
            (CONTENT_RANGE, "bytes 13-20/21", Some(400)),
            (CONTENT_RANGE, "", Some(400)),
            (CONTENT_ENCODING, "gzip", Some(415)),
            (CONTENT_ENCODING, "identity, br", Some(415)),
            (CONTENT_ENCODING, "Identity", None),
            (CONTENT_ENCODING, " ,", None),
            (CONTENT_LANGUAGE, "de", Some(415)),
            (CONTENT_DISPOSITION, "attachment", Some(415)),
            (CACHE_CONTROL, "public, max-age=3600", Some(415)),
            (CACHE_CONTROL, "no-cache, immutable", Some(415)),
            (CACHE_CONTROL, "No-Cache,no-store , max-age=0", None),
            ("content-type", "text/plain", None),
        ] {
            let refused = refusal(&[header("x", "y"), header(name, value)]);
            assert_eq!(refused.as_ref().map(|response| response.status), status, "{name}: {value}");
            assert!(refused.is_none_or(|response| text_of(&response).starts_with(name)), "{name}: {value}");
        }
    }

    #[test]
    fn puts_and_transactions_are_refused_alike_and_nothing_is_appended() {
        for (method, target) in [("PUT", "/v1/a"), ("POST", "/v1")] {
            let mut request = request(method);
            (request.target, request.headers) = (target.to_owned(), vec![header(CONTENT_ENCODING, "gzip")]);
            let response = rest::handle(&mut Store::default(), request, unasked);
            assert_eq!((response.status, header_of(&response, "accept-encoding")), (415, Some("identity")), "{method}");
        }
    }
}

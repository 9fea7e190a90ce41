//! Errors for programs: `application/problem+json` (RFC 9457) in place of a line of text, for those who ask for it.

use serde::Serialize;

use crate::answer::header;
use crate::content_type;
use crate::kvs::store::http::{Header, Response};

pub const ACCEPT: &str = "accept";

const MEDIA_TYPE: &str = "application/problem+json";

#[derive(Serialize)]
struct Problem<'r> {
    r#type: &'r str,
    title: &'r str,
    status: u16,
    detail: &'r str,
}

/// Whether the headers of a request ask for it by name.
pub fn is_wanted(headers: &[Header]) -> bool {
    let accepts = headers.iter().filter(|header| header.name == ACCEPT);
    let mut ranges = accepts.flat_map(|header| header.value.split(|byte| *byte == b','));
    ranges.any(|range| {
        let mut parts = range.split(|byte| *byte == b';').map(<[u8]>::trim_ascii);
        let named = parts.next().is_some_and(|name| name.eq_ignore_ascii_case(MEDIA_TYPE.as_bytes()));
        named && !parts.any(|parameter| matches!(parameter, b"q=0" | b"q=0.0" | b"q=0.00" | b"q=0.000"))
    })
}

/// The same answer as a problem, when it is an error.
pub fn of(mut response: Response) -> Response {
    if response.status < 400 {
        return response;
    }
    let detail = String::from_utf8_lossy(&response.body).trim_end().to_owned();
    let problem =
        Problem { r#type: "about:blank", title: title(response.status), status: response.status, detail: &detail };
    response.body = serde_json::to_vec(&problem).unwrap_or_default();
    response.headers.retain(|header| header.name != content_type::NAME);
    response.headers.push(header(content_type::NAME, MEDIA_TYPE));
    response
}

/// What HTTP calls those of the statuses that are given here.
fn title(status: u16) -> &'static str {
    match status {
        400 => "Bad Request",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        409 => "Conflict",
        412 => "Precondition Failed",
        413 => "Content Too Large",
        416 => "Range Not Satisfiable",
        422 => "Unprocessable Content",
        503 => "Service Unavailable",
        507 => "Insufficient Storage",
        _ => "Internal Server Error",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::answer::{line, with};

    #[test]
    fn it_is_wanted_when_it_is_named() {
        for (accept, wanted) in [
            ("application/problem+json", true),
            ("text/html, Application/Problem+JSON;q=0.5", true),
            ("application/problem+json; q=0", false),
            ("application/json", false),
            ("*/*", false),
            ("application/*", false),
            ("", false),
        ] {
            assert_eq!(is_wanted(&[header(ACCEPT, accept)]), wanted, "{accept}");
        }
        assert!(!is_wanted(&[header("x", MEDIA_TYPE)]));
        assert!(is_wanted(&[header(ACCEPT, "text/html"), header(ACCEPT, MEDIA_TYPE)]));
    }

    #[test]
    fn it_says_what_the_line_said() {
        let problem = of(with(line(405, "a \"line\""), header("allow", "GET")));
        let body = r#"{"type":"about:blank","title":"Method Not Allowed","status":405,"detail":"a \"line\""}"#;
        assert_eq!(str::from_utf8(&problem.body), Ok(body));
        let types: Vec<_> = problem.headers.iter().filter(|header| header.name == content_type::NAME).collect();
        assert_eq!(types, [&header(content_type::NAME, MEDIA_TYPE)]);
        assert!(problem.headers.contains(&header("allow", "GET")));
        let fine = line(200, "fine");
        assert_eq!(of(fine.clone()), fine);
    }
}

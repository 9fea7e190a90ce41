//! The console: a page that shows the server to an operator, and lets the operator change it. Plain HTML, CSS and JavaScript,
//! part of the binary; everything it knows it asks the admin listener for.
//!
//! Must never know: what the page does.

use hyper::StatusCode;
use hyper::header::{
    self, CONTENT_SECURITY_POLICY, HeaderName, HeaderValue, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS, X_FRAME_OPTIONS,
};

use super::{Answer, text};

/// A file of the page.
#[derive(Clone, Copy)]
pub struct File {
    path: &'static str,
    media_type: &'static str,
    content: &'static str,
}

const HTML: &str = "text/html; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";

const FILES: [File; 8] = [
    File { path: "/console", media_type: HTML, content: include_str!("index.html") },
    File { path: "/console/style.css", media_type: CSS, content: include_str!("style.css") },
    File { path: "/console/app.js", media_type: SCRIPT, content: include_str!("app.js") },
    File { path: "/console/server.js", media_type: SCRIPT, content: include_str!("server.js") },
    File { path: "/console/charts.js", media_type: SCRIPT, content: include_str!("charts.js") },
    File { path: "/console/guest.js", media_type: SCRIPT, content: include_str!("guest.js") },
    File { path: "/console/keys.js", media_type: SCRIPT, content: include_str!("keys.js") },
    File { path: "/console/watch.js", media_type: SCRIPT, content: include_str!("watch.js") },
];

/// Nothing from elsewhere, nothing inline, and no text that becomes a script: keys and values are anybody's.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; base-uri 'none'; \
                      form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'";

const HEADERS: [(HeaderName, &str); 4] = [
    (CONTENT_SECURITY_POLICY, POLICY),
    (REFERRER_POLICY, "no-referrer"),
    (X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (X_FRAME_OPTIONS, "DENY"),
];

pub fn file(path: &str) -> Option<File> {
    FILES.into_iter().find(|file| file.path == path)
}

pub fn page(file: File) -> Answer {
    let mut response = text(StatusCode::OK, file.content);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(file.media_type));
    for (name, value) in HEADERS {
        headers.insert(name, HeaderValue::from_static(value));
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Most bytes of the page.
    const MAX_BYTES: usize = 150 << 10;

    #[test]
    fn page_is_small_and_complete() {
        assert!(FILES.iter().map(|file| file.content.len()).sum::<usize>() < MAX_BYTES);
        for file in FILES {
            let of_script = |line: &'static str| line.split_once("from './")?.1.split('\'').next();
            let of_page = |line: &'static str| line.split_once("=\"/console/")?.1.split('"').next();
            for name in file.content.lines().filter_map(|line| of_script(line).or_else(|| of_page(line))) {
                assert!(super::file(&format!("/console/{name}")).is_some(), "{} names {name}", file.path);
            }
        }
    }

    #[test]
    fn page_makes_no_text_a_script() {
        for file in FILES {
            for unsafe_word in
                ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "onclick=", "style=\""]
            {
                assert!(!file.content.contains(unsafe_word), "{} has {unsafe_word}", file.path);
            }
        }
    }
}

//! Key of a kept response: all that a guest is given of a request, but for the time.
//!
//! Made of the record that is handed to the guest, every field of it: two requests with one key are one request to the
//! guest, and what it may not distinguish needs no other rule. A field that the contract adds does not compile until it is here.

use crate::contract::{Grant, Request, Scope};

/// Bytes of the length of a part.
const LENGTH: usize = size_of::<u32>();

/// The key of a request, unless it has a body.
pub fn of(request: &Request<'_>) -> Option<Vec<u8>> {
    let Request { method, target, headers, body, principal, grant: Grant { scope, key_prefix }, time_ms: _ } = request;
    if !body.is_empty() {
        return None;
    }
    let parts = headers.iter().map(|header| 2 * LENGTH + header.name.len() + header.value.len()).sum::<usize>();
    let options = [*principal, *key_prefix].map(|option| 1 + LENGTH + option.map_or(0, str::len));
    // Exact, so that what is kept is not copied once more.
    let size = 2 * LENGTH + method.len() + target.len() + parts + LENGTH + options.iter().sum::<usize>() + 1;
    let mut key = Key(Vec::with_capacity(size));
    key.add(method.as_bytes());
    key.add(target.as_bytes());
    for header in *headers {
        key.add(header.name.as_bytes());
        key.add(header.value);
    }
    // No header has this length: the headers end here.
    key.0.extend(u32::MAX.to_ne_bytes());
    key.add_option(*principal);
    key.0.push(match scope {
        Scope::Read => 0,
        Scope::Write => 1,
        Scope::Admin => 2,
    });
    key.add_option(*key_prefix);
    Some(key.0)
}

/// Parts one after the other, each behind its length, so that no two lists of parts are the same bytes.
struct Key(Vec<u8>);

impl Key {
    fn add(&mut self, part: &[u8]) {
        self.0.extend((part.len() as u32).to_ne_bytes());
        self.0.extend(part);
    }

    fn add_option(&mut self, part: Option<&str>) {
        self.0.push(u8::from(part.is_some()));
        self.add(part.unwrap_or_default().as_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contract::HeaderRef;

    const NOBODY: Grant<'_> = Grant { scope: Scope::Read, key_prefix: None };

    #[test]
    fn requests_differ_in_whatever_the_guest_is_given() {
        let header = |name, value: &'static str| HeaderRef { name, value: value.as_bytes() };
        let heads = [
            vec![],
            vec![header("a", "b")],
            vec![header("a", "b"), header("a", "b")],
            vec![header("a", "bc")],
            vec![header("ab", "c")],
            vec![header("a", "c")],
            vec![header("a", "c"), header("a", "b")],
            vec![header("a", "b"), header("a", "c")],
        ];
        let mut keys = Vec::new();
        for method in ["GET", "HEAD"] {
            for target in ["/v1/a", "/v1/a?", "/v1/%61", "/v1/b"] {
                for headers in &heads {
                    for principal in [None, Some(""), Some("eve"), Some("adam")] {
                        for scope in [Scope::Read, Scope::Write, Scope::Admin] {
                            for key_prefix in [None, Some(""), Some("a"), Some("b")] {
                                let grant = Grant { scope, key_prefix };
                                keys.push(of(&Request {
                                    method,
                                    target,
                                    headers,
                                    body: b"",
                                    principal,
                                    grant,
                                    time_ms: 1,
                                }));
                            }
                        }
                    }
                }
            }
        }
        let count = keys.len();
        keys.sort_unstable();
        keys.dedup();
        assert_eq!((keys.len(), keys[0].is_some()), (count, true));
        assert!(keys.iter().flatten().all(|key| key.capacity() == key.len()));
    }

    #[test]
    fn request_at_another_time_is_equal_and_one_with_body_has_none() {
        let at = |time_ms, body| {
            of(&Request { method: "GET", target: "/", headers: &[], body, principal: None, grant: NOBODY, time_ms })
        };
        assert_eq!(at(1, b""), at(2, b""));
        assert_eq!(at(1, b"x"), None);
    }
}

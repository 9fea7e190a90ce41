//! The key prefix of a grant: which keys a client may see and change.
//!
//! A request that names a key outside of it is rejected, and what a request asks of many keys is narrowed to it: the client sees
//! the store as if no other keys were there. Must never know: what a request does with a key.

use std::borrow::Cow;

use crate::kvs::store::http::Grant;

/// Rejects a key outside of the prefix, with the reason.
pub fn check(grant: &Grant, key: &str) -> Result<(), String> {
    if key.starts_with(prefix(grant)) { Ok(()) } else { Err(outside(grant)) }
}

/// Prefix of the keys that begin both with `asked` and with the prefix of the grant. Rejected when there can be none.
pub fn narrow<'a>(grant: &'a Grant, asked: Cow<'a, str>) -> Result<Cow<'a, str>, String> {
    let prefix = prefix(grant);
    if asked.starts_with(prefix) {
        Ok(asked)
    } else if prefix.starts_with(&*asked) {
        Ok(Cow::Borrowed(prefix))
    } else {
        Err(outside(grant))
    }
}

fn prefix(grant: &Grant) -> &str {
    grant.key_prefix.as_deref().unwrap_or_default()
}

fn outside(grant: &Grant) -> String {
    format!("the token is valid only for keys that begin with `{}`", prefix(grant))
}

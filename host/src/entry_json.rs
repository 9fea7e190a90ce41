//! Entries of the log as JSON, one object per line.

use std::fmt::Write as _;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use kvs_txlog::{Entry, EventRef};

/// Formats an entry as JSON, with its sequence as text: the numbers of some readers end at 2^53.
pub fn print(entry: &Entry<'_>, line: &mut String) {
    let (sequence, time) = (entry.sequence.to_string(), entry.time);
    let value = match &entry.event {
        EventRef::Delete(key) => {
            serde_json::json!({ "sequence": sequence, "time": time, "type": "delete", "key": key })
        }
        EventRef::Put(put) => {
            let mut object = serde_json::json!({
                "sequence": sequence, "time": time, "type": "put", "key": put.key,
                "metadata": put.metadata, "expires": put.expires,
            });
            // Values are arbitrary bytes, but most are text, which is easier to read.
            match std::str::from_utf8(put.value) {
                Ok(text) => object["value"] = text.into(),
                Err(_) => object["value_base64"] = STANDARD.encode(put.value).into(),
            }
            object
        }
    };
    let _ = writeln!(line, "{value}");
}

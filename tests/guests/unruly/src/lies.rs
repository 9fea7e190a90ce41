//! What no Rust program can say without `unsafe`: lengths beyond all memory, and text that is none.
//!
//! Nothing here is read by the guest itself. The values go straight to the host, which has to see through them.

use std::mem::ManuallyDrop;
use std::ptr::NonNull;

use crate::kvs::store::http::{Header, Response};
use crate::kvs::store::transaction_log::{Event, Put, append};
use crate::{put, text};

pub fn tell(lie: &str) -> Response {
    match lie {
        "body" => Response { body: endless(), ..text(200, "") },
        "headers" => Response { headers: endless(), ..text(200, "") },
        "header-name" => {
            let name = no_text();
            Response { headers: vec![Header { name, value: Vec::new() }], ..text(200, "") }
        }
        "append-value" => said(Event::Put(Put { value: endless(), ..value() })),
        "append-metadata" => said(Event::Put(Put { metadata: endless(), ..value() })),
        "append-key" => said(Event::Delete(no_text())),
        _ => text(404, "no such lie"),
    }
}

fn value() -> Put {
    match put("lie", Vec::new()) {
        Event::Put(put) => put,
        Event::Delete(_) => unreachable!("a put was asked for"),
    }
}

/// Never comes back, when the host traps as it must.
fn said(event: Event) -> Response {
    let events = ManuallyDrop::new([event]);
    text(200, format!("{:?}", append(&*events)))
}

/// A list that claims to be as long as can be.
fn endless<T>() -> Vec<T> {
    let length = isize::MAX as usize / size_of::<T>().max(1);
    // SAFETY: none; this is the lie. Its capacity is its length, so that it is handed over without being touched.
    unsafe { Vec::from_raw_parts(NonNull::dangling().as_ptr(), length, length) }
}

fn no_text() -> String {
    // SAFETY: none; this is the lie. Nobody looks at it before the host does.
    unsafe { String::from_utf8_unchecked(vec![b'x', 0xff, 0xfe]) }
}

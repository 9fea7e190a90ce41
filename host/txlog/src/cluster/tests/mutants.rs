//! Ways to break the log, each of which the histories must find.

use std::cell::Cell;

thread_local! {
    static ACTIVE: Cell<Option<&'static str>> = const { Cell::new(None) };
}

pub fn is(name: &str) -> bool {
    ACTIVE.get() == Some(name)
}

/// Runs this with the log broken in that way.
pub fn with<T>(name: &'static str, run: impl FnOnce() -> T) -> T {
    ACTIVE.set(Some(name));
    let result = run();
    ACTIVE.set(None);
    result
}

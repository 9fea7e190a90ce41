//! The client of the HTTP interface: what `kvs get`, `put`, `delete`, `list`, `watch`, `export` and `import` do.
//!
//! Knows a server by its interface alone: nothing here reads a log or calls a guest. [`Server`] is how a request is made;
//! each other file is one operation, or the operations on one key.

mod checkpoint;
mod import;
mod list;
mod record;
mod server;
mod value;
mod watch;

pub use self::import::{NewProgressBar, import};
pub use self::list::{export, list};
pub use self::server::{Ask, Failure, Options, Server};
pub use self::value::{Condition, Put, delete, get, put};
pub use self::watch::watch;

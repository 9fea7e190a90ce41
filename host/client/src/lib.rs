//! Client of the HTTP API, for `kvs get`, `put`, `add`, `touch`, `delete`, `txn`, `list`, `watch`, `export` and `import`.
//!
//! It uses the HTTP API only: no file here reads a log or calls a guest. [`Server`] sends requests; each other file
//! implements one operation, or the operations on one key.

mod checkpoint;
mod import;
mod list;
mod origin;
mod output;
mod prefix;
mod record;
mod server;
mod txn;
mod value;
mod watch;

pub use self::import::{Copied, ImportHooks, NewProgressBar, import, import_from};
pub use self::list::{ListOptions, export, list};
pub use self::origin::Origin;
pub use self::output::Output;
pub use self::prefix::{count_prefix, delete_prefix};
pub use self::record::duration;
pub use self::server::{ApiRequest, ClientError, Options, Server, add as add_parameter};
pub use self::txn::transact;
pub use self::value::{Add, Condition, Get, Put, add, delete, get, put, touch};
pub use self::watch::watch;

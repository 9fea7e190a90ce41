//! Client of the HTTP API, for `kvs get`, `put`, `delete`, `list`, `watch`, `export` and `import`.
//!
//! It uses the HTTP API only: no file here reads a log or calls a guest. [`Server`] sends requests; each other file
//! implements one operation, or the operations on one key.

mod checkpoint;
mod import;
mod list;
mod record;
mod server;
mod value;
mod watch;

pub use self::import::{ImportHooks, NewProgressBar, import};
pub use self::list::{export, list};
pub use self::server::{ApiRequest, ClientError, Options, Server, add};
pub use self::value::{Condition, Put, delete, get, put};
pub use self::watch::watch;

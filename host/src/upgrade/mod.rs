//! `kvs upgrade`: another process takes the place of the one that serves, while requests are in flight.
//!
//! The running server starts the new process with its own flags and gives it its listeners. The new process builds the store as
//! a standby. When it has caught up, the old one takes the turns of all shards, makes everything durable, closes the log, and
//! sends its lock, which is never free; a log in a service has an epoch in place of a lock, which the new process gets from the
//! old one. The new one checks that the log ends where the old one has closed it, and serves. From
//! then on the old one forwards the requests of its open connections, and ends when there are none. Until the new process
//! serves, each of its failures leaves the old one serving: after the lock was sent, once the new process has ended.
//!
//! The messages, over a pair of sockets, each with descriptors:
//!
//! | from | message | descriptors |
//! |---|---|---|
//! | old | `kvs-handover 1 listen … admin …` | the listeners, in this order; `listen` in that of the flags |
//! | new | `ready` | |
//! | old | `log POSITION` | two of the lock, if it has one; one of a pair of sockets for forwarded requests |
//! | new | `serving` | |
//!
//! Owns: the order of the steps. Must never know: how the log is closed and continued, or what a request is.

mod channel;
mod control;
mod former;
mod inherited;

pub use self::control::{Control, Upgraded, request};
pub use self::former::{Listeners, Upgrader};
pub use self::inherited::Inherited;

/// Set in the environment of the new process, whose standard input is its end of the pair of sockets.
pub const VARIABLE: &str = "KVS_HANDOVER";

/// The first words of the first message: another version of the messages has another number.
const PROTOCOL: &str = "kvs-handover 1";
const READY: &str = "ready";
const LOG: &str = "log ";
const SERVING: &str = "serving";

/// Names of the listeners in the first message.
const LISTEN: &str = "listen";
const LISTEN_ACTIVATED: &str = "listen-activated";
const ADMIN: &str = "admin";
const CONTROL: &str = "control";
const WHEN_PRIMARY: &str = "when-primary";

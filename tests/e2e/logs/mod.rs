//! Logs that servers share, and the servers that share one: `postgres` and `nats` have a log in PostgreSQL and in NATS JetStream,
//! `standby` a standby on a log in files, `pair` the roles of two servers as clients and proxies see them.

mod nats;
mod pair;
mod postgres;
mod standby;

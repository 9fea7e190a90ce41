//! Logs that servers share: `postgres` and `nats` have a log in PostgreSQL and in NATS JetStream,
//! `standby` a standby on a log in files, `pair` the roles of two servers for clients and proxies.

mod nats;
mod pair;
mod postgres;
mod standby;

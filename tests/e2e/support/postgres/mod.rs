//! PostgreSQL servers for tests, and what stands between one and its clients.

pub mod database;
pub mod pooler;
pub mod proxy;

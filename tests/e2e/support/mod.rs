//! What the suites share: no tests, but servers, clients and the surroundings of both.

pub mod browser;
pub mod certificates;
pub mod linear;
pub mod load;
pub mod log;
pub mod nats;
pub mod postgres;
pub mod sabotage;
pub mod server;
pub mod wire;
pub mod zoo;

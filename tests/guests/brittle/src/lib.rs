//! The default store, but that `/trap/v1/{key}` does what `/v1/{key}` does and traps then: its clients do not learn what
//! became of what they asked.

use kvs_guest::{Kvs, Store, respond};
use kvs_kit::guest::Guest;
use kvs_kit::sharding::Sharding;
use kvs_kit::state::Logged;
use kvs_kit::{Request, Target, answer};

pub struct Brittle;

kvs_kit::export!(Brittle, sharding = Brittle);

impl Guest for Brittle {
    type State = Store;

    const NAME: &'static str = "brittle";
    const HEADERS: &'static [&'static str] = Kvs::HEADERS;

    fn handle(store: &mut Logged<'_, Store>, mut request: Request) -> answer::Result {
        let Some(target) = request.target.strip_prefix("/trap") else { return Ok(respond(store, request)) };
        request.target = target.to_owned();
        let answer = respond(store, request);
        panic!("as it was asked to, rather than answer {}", answer.status)
    }
}

impl Sharding for Brittle {
    type Base = Kvs;

    fn route(method: &str, target: &str) -> Target {
        Kvs::route(method, target.strip_prefix("/trap").unwrap_or(target))
    }
}

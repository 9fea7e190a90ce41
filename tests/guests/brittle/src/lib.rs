//! The default store, but that `/trap/v1/{key}` does what `/v1/{key}` does and traps then: its clients do not learn what
//! became of what they asked.

use kvs_guest::exports::kvs::store::lifecycle::Description;
use kvs_guest::exports::kvs::store::sharding::Target;
use kvs_guest::exports::kvs::store::{handler, lifecycle, sharding};
use kvs_guest::kvs::store::http::{Request, Response};

type Default = kvs_guest::Component;

/// What the host instantiates.
pub struct Component;

impl handler::Guest for Component {
    fn handle(mut request: Request) -> Response {
        let Some(target) = request.target.strip_prefix("/trap") else { return Default::handle(request) };
        request.target = target.to_owned();
        let answer = Default::handle(request);
        panic!("as it was asked to, rather than answer {}", answer.status)
    }
}

impl lifecycle::Guest for Component {
    fn describe() -> Description {
        Description { name: "brittle".to_owned(), ..Default::describe() }
    }

    kvs_guest::default_lifecycle!();
}

impl sharding::Guest for Component {
    fn route(method: String, target: String) -> Target {
        let target = target.strip_prefix("/trap").map(str::to_owned).unwrap_or(target);
        Default::route(method, target)
    }

    fn extract_keys(body: Vec<u8>) -> Vec<String> {
        Default::extract_keys(body)
    }

    fn merge_responses(request: Request, responses: Vec<Response>) -> Response {
        Default::merge_responses(request, responses)
    }
}

// The names under which a component exports its calls are none that a native linker takes.
#[cfg(target_arch = "wasm32")]
kvs_guest::export!(Component with_types_in kvs_guest);

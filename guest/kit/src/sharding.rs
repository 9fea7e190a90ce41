//! Routing of requests to shards, for guests that run in several.

pub use crate::sharding_bindings::exports::kvs::store::sharding::Target;

use crate::bindings::kvs::store::http::{Request, Response};
use crate::{answer, key, path};

/// Functions of `sharding`, pure functions of their arguments. Those that are left out are those of `Base`.
pub trait Sharding {
    type Base: Sharding;

    /// The instances that a request is for.
    fn route(method: &str, target: &str) -> Target {
        Self::Base::route(method, target)
    }

    /// The keys in a body, for `Target::KeysInBody`.
    fn extract_keys(body: &[u8]) -> Vec<String> {
        Self::Base::extract_keys(body)
    }

    /// One response of those of all shards, for `Target::AllShards`. Without responses, the keys that `extract_keys` found lie
    /// in several shards.
    fn merge_responses(request: &Request, responses: Vec<Response>) -> Response {
        Self::Base::merge_responses(request, responses)
    }
}

/// Routing by keys in paths: `/v1/{key}` and `/v1/key/{key}`.
pub struct KeyInPath;

impl Sharding for KeyInPath {
    type Base = Self;

    fn route(_method: &str, target: &str) -> Target {
        let (path, _) = path::split(target);
        key::in_path(path).map_or(Target::AnyShard, |key| Target::Key(key.into_owned()))
    }

    fn extract_keys(_body: &[u8]) -> Vec<String> {
        Vec::new()
    }

    /// The first error, or else the first response.
    fn merge_responses(_request: &Request, mut responses: Vec<Response>) -> Response {
        if responses.is_empty() {
            return answer::cross_shard();
        }
        let error = responses.iter().position(|response| response.status >= 400);
        responses.swap_remove(error.unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_goes_to_the_shard_of_its_key() {
        assert!(matches!(KeyInPath::route("GET", "/v1/%61?b"), Target::Key(key) if key == "a"));
        assert!(matches!(KeyInPath::route("GET", "/v2/a"), Target::AnyShard));
    }

    #[test]
    fn error_of_one_shard_is_the_response() {
        let request = crate::testing::request("GET", "/", "");
        let merged = |statuses: &[u16]| {
            let responses = statuses.iter().map(|status| answer::line(*status, ""));
            KeyInPath::merge_responses(&request, responses.collect()).status
        };
        assert_eq!([merged(&[200, 503, 404]), merged(&[201, 200]), merged(&[])], [503, 201, 422]);
    }
}

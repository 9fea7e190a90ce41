//! The default store, with a policy: a value whose key begins with a prefix matches the JSON schema of that prefix, or is
//! rejected with 422.
//!
//! The schemas are the operator's settings: `--guest-config 'schema.users/={"type":"object"}'`. The policy looks at what is
//! about to be appended and not at requests, so that no way to write goes round it. What is in the log already stays.

use std::cell::OnceCell;

use jsonschema::Validator;
use kvs_guest::{Kvs, Store, respond};
use kvs_kit::answer::{self, line};
use kvs_kit::guest::Guest;
use kvs_kit::state::Logged;
use kvs_kit::text::printable;
use kvs_kit::{Event, Request, Response, config};
use serde_json::Value;

/// Characters of a reason, which repeats what was sent.
const REASON_CHARACTERS: usize = 200;

thread_local! {
    /// Prefixes and the schemas of their values.
    static POLICY: OnceCell<Vec<(String, Validator)>> = const { OnceCell::new() };
}

pub struct Schema;

kvs_kit::export!(Schema, sharding = Kvs);

impl Guest for Schema {
    type State = Store;

    const NAME: &'static str = "schema";
    const HEADERS: &'static [&'static str] = Kvs::HEADERS;
    const CAPABILITIES: &'static [&'static str] = Kvs::CAPABILITIES;

    fn start() {
        POLICY.with(|policy| policy.get_or_init(schemas).len());
    }

    fn handle(store: &mut Logged<'_, Store>, request: Request) -> answer::Result {
        Ok(respond(store, request))
    }

    fn check(event: &Event) -> Result<(), Response> {
        let Event::Put(put) = event else { return Ok(()) };
        POLICY.with(|policy| {
            let policy = policy.get_or_init(schemas).iter();
            policy.filter(|(prefix, _)| put.key.starts_with(prefix)).try_for_each(|(prefix, schema)| {
                let violated = |reason: String| {
                    let reason = printable(&reason, REASON_CHARACTERS);
                    line(422, &format!("a value under {prefix} must match its schema: {reason}"))
                };
                let value: Value =
                    serde_json::from_slice(&put.value).map_err(|error| violated(format!("it is not JSON: {error}")))?;
                schema.validate(&value).map_err(|error| violated(format!("{error}, at \"{}\"", error.instance_path())))
            })
        })
    }
}

/// The settings `schema.PREFIX`. One that is no schema keeps the guest from starting.
fn schemas() -> Vec<(String, Validator)> {
    let settings = config::get_all().expect("this host's settings are in memory").into_iter();
    let schemas = settings.filter_map(|(name, text)| Some((name.strip_prefix("schema.")?.to_owned(), text)));
    let compiled = schemas.map(|(prefix, text)| {
        let schema = serde_json::from_str::<Value>(&text).map_err(|error| error.to_string());
        let schema = schema.and_then(|schema| jsonschema::validator_for(&schema).map_err(|error| error.to_string()));
        let schema = schema.unwrap_or_else(|error| panic!("the setting schema.{prefix} is no JSON schema: {error}"));
        (prefix, schema)
    });
    compiled.collect()
}

//! The default store, with a policy: a value whose key begins with a prefix matches the JSON schema of that prefix, or is
//! refused with 422.
//!
//! The schemas are the operator's settings: `--guest-config 'schema.users/={"type":"object"}'`. The policy looks at what is
//! about to be appended and not at requests, so that no way to write goes round it. What is in the log already stays: a
//! guest takes in every entry, whoever wrote it.

use std::cell::OnceCell;

use jsonschema::Validator;
use kvs_guest::answer::{Host, line};
use kvs_guest::exports::kvs::store::lifecycle::Description;
use kvs_guest::exports::kvs::store::{handler, lifecycle, sharding};
use kvs_guest::kvs::store::http::{Request, Response};
use kvs_guest::kvs::store::transaction_log::{AppendError, Event};
use kvs_guest::kvs::store::watch::Selector;
use kvs_guest::wasi::config::store as config;
use kvs_guest::{Imports, rest};
use serde_json::Value;

/// Characters of the reason that are worth telling; it repeats what was sent.
const TOLD_CHARACTERS: usize = 200;

type Default = kvs_guest::Component;

thread_local! {
    /// Prefixes and what they ask for.
    static POLICY: OnceCell<Vec<(String, Validator)>> = const { OnceCell::new() };
}

/// What the host instantiates.
pub struct Component;

impl handler::Guest for Component {
    fn handle(request: Request) -> Response {
        let mut checked = Checked::default();
        let response = kvs_guest::STORE.with_borrow_mut(|store| rest::respond(store, request, &mut checked));
        match checked.violation {
            Some(why) => line(422, &why),
            None => response,
        }
    }
}

/// The host, but for what the policy does not let happen.
#[derive(std::default::Default)]
struct Checked {
    violation: Option<String>,
}

impl Host for Checked {
    fn append(&mut self, events: &[Event]) -> Result<u64, AppendError> {
        self.violation = events.iter().find_map(violation_of);
        if self.violation.is_some() { Err(AppendError::ReadOnly) } else { Imports.append(events) }
    }

    fn subscribe(&mut self, selectors: &[Selector], after: Option<&str>, puts_only: bool) {
        Imports.subscribe(selectors, after, puts_only);
    }

    fn wait_for_change(&mut self, key: &str, timeout_ms: u64) {
        Imports.wait_for_change(key, timeout_ms);
    }

    fn reuse(&mut self, key: &str, until_ms: Option<u64>) {
        Imports.reuse(key, until_ms);
    }
}

/// Why the policy does not let this happen, in one line.
fn violation_of(event: &Event) -> Option<String> {
    let Event::Put(put) = event else { return None };
    POLICY.with(|policy| {
        let policy = policy.get_or_init(settings).iter().filter(|(prefix, _)| put.key.starts_with(prefix));
        let mut value = None;
        for (prefix, schema) in policy {
            let value = value.get_or_insert_with(|| serde_json::from_slice::<Value>(&put.value));
            let why = match value {
                Ok(value) => {
                    schema.validate(value).err().map(|error| format!("{error}, at \"{}\"", error.instance_path()))
                }
                Err(error) => Some(format!("it is not JSON: {error}")),
            };
            if let Some(why) = why {
                let why: String =
                    why.chars().filter(|character| !character.is_control()).take(TOLD_CHARACTERS).collect();
                return Some(format!("a value under {prefix} must match its schema: {why}"));
            }
        }
        None
    })
}

/// The settings `schema.PREFIX`. One that is no schema ends the guest before it serves, and says why.
fn settings() -> Vec<(String, Validator)> {
    let settings = config::get_all().expect("this host's settings are in memory");
    let schemas =
        settings.into_iter().filter_map(|(name, text)| Some((name.strip_prefix("schema.")?.to_owned(), text)));
    let compiled = schemas.map(|(prefix, text)| {
        let schema = serde_json::from_str(&text).map_err(|error| error.to_string());
        let schema =
            schema.and_then(|schema: Value| jsonschema::validator_for(&schema).map_err(|error| error.to_string()));
        (
            prefix.clone(),
            schema.unwrap_or_else(|error| panic!("the setting schema.{prefix} is no JSON schema: {error}")),
        )
    });
    compiled.collect()
}

impl lifecycle::Guest for Component {
    fn describe() -> Description {
        POLICY.with(|policy| policy.get_or_init(settings).len());
        Description { name: "schema".to_owned(), ..Default::describe() }
    }

    kvs_guest::default_lifecycle!();
}

impl sharding::Guest for Component {
    kvs_guest::default_sharding!();
}

// The names under which a component exports its calls are none that a native linker takes.
#[cfg(target_arch = "wasm32")]
kvs_guest::export!(Component with_types_in kvs_guest);

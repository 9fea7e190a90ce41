//! The operations of a transaction as they are sent, in JSON.
//!
//! Owns: what each may say, and the place of what is wrong. Must never know: what is in the store, or what becomes of them.

use std::fmt;

use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::content_type;
use crate::duration;
use crate::key;
use crate::kvs::store::transaction_log::Put;
use crate::text;
use crate::write::MAX_TTL;

const MAX_OPERATIONS: usize = 1_000;
const MAX_BYTES: usize = 1 << 20;
/// Characters of a parser's message that are worth repeating.
const ECHOED_CHARACTERS: usize = 300;

/// An operation as it is sent.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Sent {
    op: Op,
    key: String,
    #[serde(default, deserialize_with = "said")]
    value: Option<String>,
    #[serde(default, deserialize_with = "said")]
    value_base64: Option<String>,
    #[serde(default, deserialize_with = "said")]
    content_type: Option<String>,
    #[serde(default, deserialize_with = "said")]
    json: Option<Box<RawValue>>,
    #[serde(default, deserialize_with = "said")]
    ttl: Option<Ttl>,
    #[serde(default, deserialize_with = "said")]
    delta: Option<i64>,
    /// `null` is no such key.
    #[serde(default, deserialize_with = "said")]
    etag: Option<Option<String>>,
}

#[derive(Clone, Copy, Deserialize, Serialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum Op {
    Check,
    Put,
    Delete,
    Get,
    Add,
}

/// What is to be done.
pub enum Operation {
    Check(Expected),
    Put(Put),
    Delete,
    Get,
    /// With a new expiry, when there is one.
    Add {
        delta: i64,
        expires: Option<u64>,
    },
}

/// What a check wants to find.
pub enum Expected {
    Nothing,
    Something,
    Tag(String),
    Value(Vec<u8>),
}

/// A time to live, in milliseconds: a number of seconds, or a duration in text.
struct Ttl(Option<u64>);

/// Why a transaction is refused: the status, and one line.
pub type Refused = (u16, String);

/// All of a body, each with its key.
pub fn operations(body: &[u8], now: u64) -> Result<Vec<(String, Operation)>, Refused> {
    if body.len() > MAX_BYTES {
        let length = body.len();
        return Err((413, format!("the transaction is {length} bytes, at most {MAX_BYTES} are allowed")));
    }
    let Transaction(sents) = serde_json::from_slice(body).map_err(|error| (400, printable(&error)))?;
    let operation =
        |(at, sent): (usize, Sent)| operation(sent, now).map_err(|reason| (400, format!("operation {at}: {reason}")));
    sents.into_iter().enumerate().map(operation).collect()
}

/// Checks what JSON cannot say.
fn operation(sent: Sent, now: u64) -> Result<(String, Operation), String> {
    let Sent { op, key, value, value_base64, content_type, json, ttl, delta, etag } = sent;
    key::check(&key).map_err(|no_key| no_key.to_string())?;
    let given = [
        ("value", value.is_some(), matches!(op, Op::Put | Op::Check)),
        ("value_base64", value_base64.is_some(), matches!(op, Op::Put | Op::Check)),
        ("content_type", content_type.is_some(), op == Op::Put),
        ("json", json.is_some(), op == Op::Put),
        ("ttl", ttl.is_some(), matches!(op, Op::Put | Op::Add)),
        ("delta", delta.is_some(), op == Op::Add),
        ("etag", etag.is_some(), op == Op::Check),
    ];
    if let Some((name, ..)) = given.into_iter().find(|(_, is_there, belongs)| *is_there && !belongs) {
        return Err(format!("`{name}` does not belong to it"));
    }
    let expires = match ttl {
        None => None,
        Some(Ttl(Some(ttl))) if (1..=MAX_TTL).contains(&ttl) => Some(now.saturating_add(ttl)),
        Some(Ttl(_)) => return Err(format!("`ttl` must be {}", duration::Within(1..=MAX_TTL))),
    };
    let operation = match op {
        Op::Check => Operation::Check(match (etag, value.is_some() || value_base64.is_some()) {
            (None, true) => Expected::Value(text::value(value, value_base64)?),
            (None, false) => return Err("`etag`, `value` or `value_base64` is missing".to_owned()),
            (Some(_), true) => return Err("`etag` and a value are both there".to_owned()),
            (Some(None), false) => Expected::Nothing,
            (Some(Some(any)), false) if any == "*" => Expected::Something,
            (Some(Some(tag)), false) if is_tag(&tag) => Expected::Tag(tag),
            (Some(Some(_)), false) => {
                return Err(r#"`etag` must be null, "*", or an entity tag like "\"5\"""#.to_owned());
            }
        }),
        Op::Put => {
            let (value, content_type) = match json {
                None => (text::value(value, value_base64)?, content_type),
                Some(_) if value.is_some() || value_base64.is_some() => {
                    return Err("`json` and another value are both there".to_owned());
                }
                Some(json) => (json.get().into(), content_type.or(Some("application/json".to_owned()))),
            };
            let content_type = content_type.map(content_type::fit).transpose().map_err(|unfit| unfit.to_string())?;
            let metadata = content_type.flatten().map(|value| (content_type::NAME.to_owned(), value));
            Operation::Put(Put {
                key: key.clone(),
                value,
                metadata: metadata.into_iter().collect(),
                expires_at_ms: expires,
            })
        }
        Op::Delete => Operation::Delete,
        Op::Get => Operation::Get,
        Op::Add => Operation::Add { delta: delta.ok_or("`delta` is missing")?, expires },
    };
    Ok((key, operation))
}

fn is_tag(text: &str) -> bool {
    let opaque = text.strip_prefix('"').and_then(|text| text.strip_suffix('"'));
    opaque.is_some_and(|opaque| !opaque.contains('"'))
}

/// A field that is there. `null` is a value of its own, and only good where it means something.
fn said<'de, D: Deserializer<'de>, T: Deserialize<'de>>(field: D) -> Result<Option<T>, D::Error> {
    T::deserialize(field).map(Some)
}

impl<'de> Deserialize<'de> for Ttl {
    fn deserialize<D: Deserializer<'de>>(field: D) -> Result<Self, D::Error> {
        struct Duration;
        impl Visitor<'_> for Duration {
            type Value = Ttl;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a whole number of seconds or a duration")
            }

            fn visit_u64<E>(self, seconds: u64) -> Result<Ttl, E> {
                Ok(Ttl(seconds.checked_mul(1_000)))
            }

            fn visit_str<E>(self, text: &str) -> Result<Ttl, E> {
                Ok(Ttl(duration::parse(text)))
            }
        }
        field.deserialize_any(Duration)
    }
}

/// All operations of a transaction, in order. An error names the one it is in.
#[derive(Default)]
struct Transaction(Vec<Sent>);

impl<'de> Deserialize<'de> for Transaction {
    fn deserialize<D: Deserializer<'de>>(body: D) -> Result<Self, D::Error> {
        body.deserialize_seq(Self::default())
    }
}

impl<'de> Visitor<'de> for Transaction {
    type Value = Self;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of operations")
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut list: A) -> Result<Self, A::Error> {
        loop {
            let at = self.0.len();
            match list.next_element() {
                Ok(None) => return Ok(self),
                Ok(Some(_)) if at == MAX_OPERATIONS => {
                    return Err(A::Error::custom(format!("at most {MAX_OPERATIONS} operations are allowed")));
                }
                Ok(Some(Object(sent))) => self.0.push(sent),
                Err(error) => return Err(A::Error::custom(format!("operation {at}: {error}"))),
            }
        }
    }
}

/// An operation that is an object. Without this, a list of all values of its fields would do too.
struct Object(Sent);

impl<'de> Deserialize<'de> for Object {
    fn deserialize<D: Deserializer<'de>>(operation: D) -> Result<Self, D::Error> {
        struct Fields;
        impl<'de> Visitor<'de> for Fields {
            type Value = Object;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an operation")
            }

            fn visit_map<A: MapAccess<'de>>(self, fields: A) -> Result<Object, A::Error> {
                Sent::deserialize(MapAccessDeserializer::new(fields)).map(Object)
            }
        }
        operation.deserialize_map(Fields)
    }
}

/// What a parser says, which repeats what was sent, as a line.
fn printable(error: &serde_json::Error) -> String {
    error.to_string().chars().filter(|character| !character.is_control()).take(ECHOED_CHARACTERS).collect()
}

//! The default store with a lock service: `/locks/{name}` is a lock that a client holds for a time (a lease), with a fencing
//! token that grows with every grant. docs/locks.md describes it.
//!
//! A lock is a key of this guest that expires with the lease, and so is each waiter, whose first sequence is its place in the
//! queue.
//! A free lock is offered to the first waiter for `CLAIM_MS`. That waiter gets it in a call of its own request, which the host
//! makes only while the client is connected.

use kvs_guest::own::Own;
use kvs_guest::{Kvs, Store, own, respond};
use kvs_kit::answer::{self, not_allowed, problem};
use kvs_kit::query::{self, BadQuery, Parameter};
use kvs_kit::{Event, Guest, Logged, Request, Sharding, Target, log, path};
use serde::{Deserialize, Serialize};
use serde_json::json;

/// Time in which the first waiter claims a free lock, and which a waiter keeps its place beyond its wait.
const CLAIM_MS: u64 = 1_000;
const MAX_TTL_MS: u64 = 86_400_000;
const MAX_WAIT_MS: u64 = 300_000;
const MAX_WAITERS: usize = 100;

pub struct Locks;

kvs_kit::export!(Locks, sharding = Locks);

#[derive(Deserialize, Serialize)]
struct Lock {
    owner: String,
    /// Fencing token. 0 is an offer, which the owner has not claimed yet.
    token: u64,
}

#[derive(Deserialize, Serialize)]
struct Waiter {
    /// Place in the queue. None in the first request, whose sequence it is.
    place: Option<u64>,
    /// Identifier of the request that waits. Each call of it sees its own, also the last one, whose wait is over.
    request_id: Option<String>,
}

impl Guest for Locks {
    type State = Store;
    const NAME: &'static str = "locks";
    const HEADERS: &'static [&'static str] = Kvs::HEADERS;

    fn handle(store: &mut Logged<'_, Store>, request: Request) -> answer::Result {
        let (path, query) = path::split(&request.target);
        let Some(name) = path::segment_after(path, "/locks/")? else { return Ok(respond(store, request)) };
        let [owner, ttl, wait] = query::parameters(query, ["owner", "ttl", "wait"])?;
        let owner = owner.map(Parameter::key).transpose()?.unwrap_or_default();
        let (method, now) = (request.method.as_str(), request.time_ms);
        let expires = Some(now + ttl.map_or(Ok(30_000), |ttl| ttl.duration(1..=MAX_TTL_MS))?);
        let (key, queue) = (own::key("lock", &name, ""), own::key("lock-waiter", &name, ""));
        let (lock, waiters) = (own::get::<Lock>(store, &key, now), waiters_of(store, &queue, now));
        let token = lock.as_ref().filter(|lock| lock.value.owner == owner).map(|lock| lock.value.token);
        let is_next = lock.is_none() && waiters.first().is_none_or(|first| first.name == owner);
        let grant = |token| own::put(key.clone(), &Lock { owner: owner.to_string(), token }, expires);
        match (method, token) {
            // Also a request that is sent again.
            ("GET" | "HEAD", _) | ("POST", Some(1..)) => {}
            _ if owner.is_empty() => return Err(BadQuery::Missing("owner", "it names the client").into()),
            ("POST", _) if is_next || token == Some(0) => {
                // The sequence of the grant, or with several shards a smaller one that is greater than that of the last.
                let token = store.append(&[])?;
                store.append(&[grant(token), Event::Delete(queue.clone() + &owner)])?;
            }
            ("POST", _) => {
                if lock.is_none() {
                    store.append(&pass_on(&key, &waiters, now))?;
                }
                if let Some(wait) = wait.map(|wait| wait.duration(1..=MAX_WAIT_MS)).transpose()? {
                    let before = waiters.iter().find(|waiter| waiter.name == owner);
                    let waiter = Waiter { place: before.map(place), request_id: log::request_id() };
                    if before.is_none() && waiters.len() >= MAX_WAITERS {
                        return Err(problem(429, "too_many_waiters", "too many clients wait for the lock"));
                    }
                    if before.is_none_or(|before| before.value.request_id != waiter.request_id) {
                        store.append(&[own::put(queue + &owner, &waiter, Some(now + wait + CLAIM_MS))])?;
                    }
                    store.wait_for_change(&key, wait);
                }
                return Err(problem(409, "lock_held", "another client holds the lock or is before this one"));
            }
            ("PUT", Some(token @ 1..)) => _ = store.append(&[grant(token)])?,
            ("DELETE", Some(1..)) => _ = store.append(&pass_on(&key, &waiters, now))?,
            ("PUT" | "DELETE", _) => return Err(problem(409, "lock_not_held", "this client does not hold the lock")),
            _ => return Err(not_allowed("a lock has", "GET, HEAD, POST, PUT, DELETE")),
        }
        let (lock, waiters) = (own::get::<Lock>(store, &key, now), waiters_of(store, &queue, now));
        let held = lock.filter(|lock| lock.value.token > 0).map(|lock| {
            // The token is text, since numbers in JSON are exact up to 2^53.
            json!({ "owner": lock.value.owner, "token": lock.value.token.to_string(), "expires": lock.expires_at_ms })
        });
        let waiting: Vec<_> = waiters.iter().map(|waiter| &waiter.name).collect();
        Ok(answer::json(&json!({ "held": held, "waiting": waiting })))
    }
}

impl Sharding for Locks {
    type Base = Kvs;

    fn route(method: &str, target: &str) -> Target {
        let name = path::segment_after(path::split(target).0, "/locks/").ok().flatten();
        name.map_or_else(|| Kvs::route(method, target), |name| Target::Key(own::key("lock", &name, "")))
    }
}

/// The waiters of a lock, in the order of their first requests.
fn waiters_of(store: &Store, queue: &str, now: u64) -> Vec<Own<Waiter>> {
    let mut waiters = own::list(store, queue, now);
    waiters.sort_by_key(place);
    waiters
}

fn place(waiter: &Own<Waiter>) -> u64 {
    waiter.value.place.unwrap_or(waiter.sequence)
}

/// Offers a lock to the first waiter, which leaves the queue for it. Without one the lock is free.
fn pass_on(key: &str, waiters: &[Own<Waiter>], now: u64) -> Vec<Event> {
    let Some(first) = waiters.first() else { return vec![Event::Delete(key.to_owned())] };
    let offer = Lock { owner: first.name.clone(), token: 0 };
    vec![own::put(key.to_owned(), &offer, Some(now + CLAIM_MS)), Event::Delete(first.key.clone())]
}

#[cfg(test)]
mod tests;

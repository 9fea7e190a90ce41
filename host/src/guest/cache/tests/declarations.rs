//! Declarations of a call, and changes that it makes, as the imports of an instance take them.

use std::sync::{Arc, OnceLock};

use kvs_runtime::Env;
use kvs_txlog::{AppendError, Event, Receive, TransactionLog, Watermark};

use super::super::ResponseCache;
use super::{cache, fill, kept, request};
use crate::contract::connection::Host as _;
use crate::contract::response_cache::Host as _;
use crate::contract::transaction_log::Host as _;
use crate::contract::{self, watch::Host as _};
use crate::guest::custom::CustomMetrics;
use crate::guest::imports::{Call, Common, State};
use crate::guest::limits::{self, Limits};
use crate::guest::owner::Owners;
use crate::guest::quota::Quotas;

const KIB: usize = 1 << 10;

/// A log that looks into the cache when it is appended to.
struct Looking {
    cache: Arc<ResponseCache>,
    watermark: Watermark,
    /// Whether a response about the key was still given.
    is_kept: OnceLock<bool>,
}

impl TransactionLog for Looking {
    fn append(&self, _time: u64, _events: &[Event]) -> Result<u64, AppendError> {
        let _ = self.is_kept.set(kept(&self.cache, &request("GET", "/a")).is_some());
        Ok(8)
    }
    fn appended(&self) -> u64 {
        7
    }
    fn watermark(&self) -> &Watermark {
        &self.watermark
    }
    fn replay(&self, _after: u64, _receive: &mut Receive<'_>) -> anyhow::Result<u64> {
        Ok(7)
    }
    fn close(&self) -> anyhow::Result<()> {
        Ok(())
    }
}

/// What an instance finds in a call of `handle`, its cache and its log.
fn handling() -> (State, Arc<ResponseCache>, Arc<Looking>) {
    let (cache, clock) = cache(1 << 20);
    let log = Arc::new(Looking { cache: Arc::clone(&cache), watermark: Watermark::new(7), is_kept: OnceLock::new() });
    let limits = Limits { value_bytes: KIB, response_bytes: KIB, appends: 10, ..limits::tests::limits(1 << 30, None) };
    let part = Owners::new(1, &Env::real().random).unwrap().part(0);
    let common = Common {
        config: Arc::default(),
        limits,
        clock,
        cache: Arc::clone(&cache),
        total_memory: Arc::default(),
        metrics: Arc::new(CustomMetrics::new(1, Arc::default())),
        quotas: Quotas::new(&Env::real().random).unwrap(),
    };
    let mut state = State::new(log.clone(), part, common);
    state.now();
    let client = Some(Arc::clone(&request("GET", "/a").client));
    state.call = Call { may_append: true, client, serving: cache.serving(), ..Call::default() };
    (state, cache, log)
}

fn keys(keys: &[&str]) -> Vec<String> {
    keys.iter().map(|key| (*key).to_owned()).collect()
}

#[test]
fn change_is_announced_before_the_log_has_it() {
    let (mut state, cache, log) = handling();
    fill(&cache, &request("GET", "/a"), "old");
    assert!(kept(&cache, &request("GET", "/a")).is_some());
    assert!(state.append(vec![contract::Event::Delete("a".to_owned())]).is_ok());
    assert_eq!(log.is_kept.get(), Some(&false), "a watcher can hear of the change while the old response is given");
}

#[test]
fn last_declaration_of_a_call_counts() {
    let (mut state, cache, _) = handling();
    assert!(state.reuse_declared().is_none());
    state.reuse(keys(&["a"]), None);
    assert!(state.reuse_declared().is_some());
    let now = state.now();
    for (names, until) in [(&["a", ""][..], None), (&["a"], Some(now)), (&["a"], Some(0))] {
        state.reuse(keys(&["a"]), None);
        state.reuse(keys(names), until);
        assert!(state.reuse_declared().is_none(), "{names:?} {until:?}");
    }
    assert_eq!(cache.void.get(), 0);
    state.reuse(keys(&["a"; 100]), Some(u64::MAX));
    assert!(state.reuse_declared().is_some());
    state.reuse(keys(&["a"; 101]), None);
    assert!(state.reuse_declared().is_none() && cache.void.get() == 1);
}

#[test]
fn call_that_does_more_has_a_void_declaration() {
    let deeds: [fn(&mut State); 6] = [
        |state| {
            let _ = state.append(Vec::new());
        },
        |state| state.subscribe(Vec::new(), None, false),
        |state| state.wait_for_change("a".to_owned(), 1),
        |state| drop(state.peer_address()),
        |state| drop(state.tls_version()),
        |state| drop(state.client_identity()),
    ];
    for (number, deed) in deeds.into_iter().enumerate() {
        for is_before in [true, false] {
            let (mut state, cache, _) = handling();
            if is_before {
                deed(&mut state);
            }
            state.reuse(keys(&["a"]), None);
            if !is_before {
                deed(&mut state);
            }
            assert!(state.reuse_declared().is_none() && cache.void.get() == 1, "deed {number}");
        }
    }
}

#[test]
fn declaration_outside_of_a_request_is_none() {
    let (mut state, cache, _) = handling();
    state.call = Call { may_append: true, ..Call::default() };
    state.reuse(keys(&["a"]), None);
    assert!(state.reuse_declared().is_none() && cache.void.get() == 0);
}

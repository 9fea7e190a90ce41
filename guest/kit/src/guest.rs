//! Guests: what an author writes, and how it becomes the exports of a component.

use crate::answer;
use crate::bindings::exports::kvs::store::lifecycle::{Batch, Description, Statistics};
use crate::host::{Checked, Host};
use crate::state::{Logged, State, entries};
use crate::{Event, Request, Response};

/// A guest. Its state is `State`, its requests are here.
pub trait Guest: Sized {
    type State: State;

    /// One word, for log lines and metrics.
    const NAME: &'static str;

    /// Names of the request headers that it reads, in lower case.
    const HEADERS: &'static [&'static str] = &[];

    /// What it can do beyond its exports: `key-prefix` when it enforces the key prefix of a grant in all that it reads.
    const CAPABILITIES: &'static [&'static str] = &[];

    /// Checks the settings. A panic keeps the guest from starting, with its message as the reason.
    fn start() {}

    /// Responds to a request.
    fn handle(state: &mut Logged<'_, Self::State>, request: Request) -> answer::Result;

    /// The policy for what is about to be appended: a request that appends an event it refuses gets that response, and
    /// nothing of the group is appended. The response waits for everything that the state has, whatever its read sequence.
    fn check(_event: &Event) -> Result<(), Response> {
        Ok(())
    }
}

/// The functions of `lifecycle` and `handler`, for `export!` and for tests.
pub fn describe<G: Guest>(version: &str) -> Description {
    G::start();
    Description {
        name: G::NAME.to_owned(),
        version: version.to_owned(),
        headers: G::HEADERS.iter().map(|name| (*name).to_owned()).collect(),
        capabilities: G::CAPABILITIES.iter().map(|word| (*word).to_owned()).collect(),
    }
}

pub fn apply<G: Guest>(state: &mut G::State, batch: &Batch) {
    entries(batch).for_each(|entry| state.apply(entry));
}

pub fn tick<G: Guest>(state: &mut G::State, now_ms: u64, host: &mut impl Host) -> Option<u64> {
    State::tick(&mut Logged::new(state, &mut Checked::<G, _>::new(host)), now_ms)
}

pub fn stats<G: Guest>(state: &mut G::State) -> Statistics {
    // The host asks when a replay is over, and before the guest serves.
    state.settle();
    state.statistics()
}

pub fn handle<G: Guest>(state: &mut G::State, request: Request, host: &mut impl Host) -> Response {
    let mut host = Checked::<G, _>::new(host);
    let response = G::handle(&mut Logged::new(state, &mut host), request);
    host.response(response)
}

/// Exports a guest from the component, which the crate is when it is compiled for WebAssembly: `export!(MyGuest)`. It runs in
/// one shard; with `export!(MyGuest, sharding = KeyInPath)`, or another `Sharding`, in any number.
#[macro_export]
macro_rules! export {
    ($guest:ident $(, sharding = $sharding:path)?) => {
        // The names under which a component exports its calls are none that a native linker takes.
        #[cfg(target_arch = "wasm32")]
        mod component {
            use super::*;

            type State = <$guest as $crate::guest::Guest>::State;

            #[global_allocator]
            static ALLOCATOR: $crate::allocator::Allocator<std::alloc::System> =
                $crate::allocator::Allocator::new(std::alloc::System);

            thread_local! {
                // No two calls overlap, so a borrow of this never meets another.
                static STATE: std::cell::RefCell<State> = std::cell::RefCell::default();
            }

            struct Component;

            impl $crate::bindings::exports::kvs::store::lifecycle::Guest for Component {
                fn describe() -> $crate::bindings::exports::kvs::store::lifecycle::Description {
                    // Hash tables take their seeds here: in `apply` they would be the same in every process.
                    STATE.with_borrow(|_| ());
                    $crate::guest::describe::<$guest>(env!("CARGO_PKG_VERSION"))
                }

                fn apply(batch: $crate::bindings::exports::kvs::store::lifecycle::Batch) {
                    STATE.with_borrow_mut(|state| $crate::guest::apply::<$guest>(state, &batch));
                }

                fn tick(now_ms: u64) -> Option<u64> {
                    STATE.with_borrow_mut(|state| $crate::guest::tick::<$guest>(state, now_ms, &mut $crate::host::Imports))
                }

                fn stats() -> $crate::bindings::exports::kvs::store::lifecycle::Statistics {
                    STATE.with_borrow_mut($crate::guest::stats::<$guest>)
                }
            }

            impl $crate::bindings::exports::kvs::store::handler::Guest for Component {
                fn handle(request: $crate::Request) -> $crate::Response {
                    STATE.with_borrow_mut(|state| {
                        $crate::guest::handle::<$guest>(state, request, &mut $crate::host::Imports)
                    })
                }
            }

            $crate::bindings::export!(Component with_types_in $crate::bindings);

            $(
                impl $crate::sharding_bindings::exports::kvs::store::sharding::Guest for Component {
                    fn route(method: String, target: String) -> $crate::Target {
                        <$sharding as $crate::sharding::Sharding>::route(&method, &target)
                    }

                    fn extract_keys(body: Vec<u8>) -> Vec<String> {
                        <$sharding as $crate::sharding::Sharding>::extract_keys(&body)
                    }

                    fn merge_responses(request: $crate::Request, responses: Vec<$crate::Response>) -> $crate::Response {
                        <$sharding as $crate::sharding::Sharding>::merge_responses(&request, responses)
                    }
                }

                $crate::sharding_bindings::export!(Component with_types_in $crate::sharding_bindings);
            )?
        }
    };
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::answer::{json, line};
    use crate::state::{Entry, Statistics};
    use crate::testing::{Served, request};
    use crate::{Event, Put};

    /// Counts its requests, up to a limit that is a policy.
    struct Counter;

    #[derive(Default)]
    struct Count(u8);

    impl State for Count {
        fn apply(&mut self, entry: Entry<'_>) {
            self.0 = entry.put.map_or(0, |put| put.bytes[0]);
        }

        fn statistics(&self) -> Statistics {
            Statistics { keys: 1, bytes: 1 }
        }
    }

    impl Guest for Counter {
        type State = Count;

        const NAME: &'static str = "counter";

        fn handle(count: &mut Logged<'_, Count>, _request: Request) -> answer::Result {
            let (key, value) = ("count".to_owned(), vec![count.0 + 1]);
            count.append(&[Event::Put(Put { key, value, metadata: Vec::new(), expires_at_ms: None })])?;
            Ok(json(&count.0))
        }

        fn check(event: &Event) -> Result<(), Response> {
            match event {
                Event::Put(Put { value, .. }) if value[0] > 1 => Err(line(422, "the count is at its limit")),
                _ => Ok(()),
            }
        }
    }

    #[test]
    fn refusal_of_the_policy_depends_on_the_state() {
        let mut guest = Served::<Counter>::default();
        assert_eq!(guest.ask("POST", "/", ""), (200, "1".to_owned()));
        let refused = guest.handle(request("POST", "/", ""));
        assert_eq!((refused.status, refused.read_sequence), (422, None));
        assert_eq!(guest.log.entries.len(), 1);
    }
}

//! The default store, with a route more: `GET /length/{key}` responds with the length of a value.

use kvs_guest::{Kvs, Store, respond};
use kvs_kit::answer::{self, NO_SUCH_KEY, json, not_allowed, problem};
use kvs_kit::guest::Guest;
use kvs_kit::sharding::Sharding;
use kvs_kit::state::Logged;
use kvs_kit::{Request, Target, path, query};

pub struct MyGuest;

kvs_kit::export!(MyGuest, sharding = MyGuest);

impl Guest for MyGuest {
    type State = Store;

    const NAME: &'static str = "extension";
    const HEADERS: &'static [&'static str] = Kvs::HEADERS;

    fn handle(store: &mut Logged<'_, Store>, request: Request) -> answer::Result {
        let (path, query) = path::split(&request.target);
        let Some(key) = path::segment_after(path, "/length/")? else { return Ok(respond(store, request)) };
        query::nothing(query)?;
        if !matches!(request.method.as_str(), "GET" | "HEAD") {
            return Err(not_allowed("a length has", "GET, HEAD"));
        }
        match store.get(&key, request.time_ms) {
            Ok(item) => Ok(json(&item.value().len())),
            Err(_) => Err(problem(404, NO_SUCH_KEY, "no such key")),
        }
    }
}

impl Sharding for MyGuest {
    type Base = Kvs;

    fn route(method: &str, target: &str) -> Target {
        match path::segment_after(path::split(target).0, "/length/") {
            Ok(Some(key)) => Target::Key(key.into_owned()),
            _ => Kvs::route(method, target),
        }
    }
}

#[cfg(test)]
mod tests {
    use kvs_kit::testing::Served;

    use super::*;

    #[test]
    fn length_is_that_of_the_value() {
        let mut guest = Served::<MyGuest>::default();
        assert_eq!(guest.ask("GET", "/length/a", "").0, 404);
        assert_eq!(guest.ask("PUT", "/v1/a", "value").0, 201);
        assert_eq!(guest.ask("GET", "/length/%61", ""), (200, "5".to_owned()));
        assert_eq!(guest.rebuilt().ask("GET", "/length/a", ""), (200, "5".to_owned()));
        assert_eq!(guest.ask("PUT", "/length/a", "").0, 405);
        assert!(matches!(MyGuest::route("GET", "/length/%61"), Target::Key(key) if key == "a"));
    }
}

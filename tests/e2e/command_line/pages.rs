//! Console sessions of README.md and the book: the commands must print the output in the pages.

use tempfile::TempDir;

use crate::support::lossy::Lossy;
use crate::support::pages::{run_in, run_on};
use crate::support::server::Server;

fn run(page: &str) {
    let here = TempDir::new().expect("a temporary directory can be created");
    run_in(page, here.path());
}

macro_rules! pages {
    ($($name:ident: $page:literal,)*) => {$(
        #[test]
        fn $name() {
            run($page);
        }
    )*};
}

pages! {
    readme: "README.md",
    getting_started: "docs/getting-started.md",
    http_api: "docs/http-api.md",
    conditional_requests: "docs/conditional-requests.md",
    ttl: "docs/ttl.md",
    transactions: "docs/transactions.md",
    watches: "docs/watches.md",
    client: "docs/client.md",
    recipes: "docs/recipes.md",
    recipes_javascript: "docs/recipes-javascript.md",
    recipes_python: "docs/recipes-python.md",
    generated_clients: "docs/generated-clients.md",
    swap: "docs/swap.md",
}

/// The recipes do the same when responses to their conditional writes are lost: each write is applied once.
#[test]
fn recipes_survive_lost_responses() {
    for page in ["docs/recipes-javascript.md", "docs/recipes-python.md", "docs/generated-clients.md"] {
        let here = TempDir::new().expect("a temporary directory can be created");
        let server = Server::start(&[]);
        let proxy = Lossy::start(server.address());
        run_on(page, here.path(), &server, proxy.address);
        assert!(proxy.lost() > 1, "{page}: {} responses were lost", proxy.lost());
    }
}

//! Console sessions of README.md and the book: the commands must print the output in the pages.

use tempfile::TempDir;

use crate::support::pages::run_in;

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
    swap: "docs/swap.md",
}

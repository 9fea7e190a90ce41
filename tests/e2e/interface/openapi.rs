//! The OpenAPI document is complete: schemathesis generates valid and invalid requests from it, and every response must be
//! described there.

use std::process::Command;

use crate::support::server::Server;

/// A watch never ends, so it is requested with HEAD alone.
const HOOKS: &str = r##"
import schemathesis

@schemathesis.hook
def before_load_schema(context, schema):
    operation = schema["paths"]["/v1"]["get"]
    watch = {"$ref": "#/components/parameters/Watch"}
    operation["parameters"] = [parameter for parameter in operation["parameters"] if parameter != watch]
"##;

#[test]
fn no_answer_is_undescribed() {
    let server = Server::start(&["--durability", "os", "--max-wait", "1ms"]);
    let mut schemathesis = Command::new("schemathesis");
    schemathesis.args(["run", &server.url("/openapi.json"), "--max-examples"]);
    // Per operation, in addition to boundary values of every parameter. The seed makes a run repeatable.
    let setting = |name: &str, default: &str| std::env::var(name).unwrap_or_else(|_| default.to_owned());
    let examples: u32 = setting("KVS_TEST_API_EXAMPLES", "50").parse().expect("KVS_TEST_API_EXAMPLES is a number");
    schemathesis.arg(examples.to_string());
    schemathesis.args(["--seed", &setting("KVS_TEST_API_SEED", "1")]);
    schemathesis.args(["--phases", "examples,coverage,fuzzing", "--continue-on-failure", "--no-shrink", "--no-color"]);
    // Some rejections cannot be expressed in a schema: dot segments, lengths in bytes of UTF-8, cursors.
    schemathesis.args([
        "--exclude-checks",
        "positive_data_acceptance",
        "--warnings",
        "off",
        "--generation-database",
        "none",
    ]);
    // Too many keys in a query make the target too long, which is one more way to reject them.
    let config = "[checks]\nnegative_data_rejection.expected-statuses = [400, 401, 403, 404, 405, 406, 409, 414, 415, 422, \"5xx\"]\n";
    std::fs::write(server.data().join("schemathesis.toml"), config).expect("the directory takes a file");
    std::fs::write(server.data().join("hooks.py"), HOOKS).expect("the directory takes a file");
    schemathesis.env("SCHEMATHESIS_HOOKS", "hooks");
    // A proxy in the environment is not for a server on this machine.
    let run = schemathesis.env("NO_PROXY", "*").current_dir(server.data()).output();
    let run = run.unwrap_or_else(|error| panic!("schemathesis cannot be run ({error}): `just test` installs it"));
    let said = String::from_utf8_lossy(&run.stdout);
    assert!(run.status.success(), "{said}\n{}", String::from_utf8_lossy(&run.stderr));
    let generated =
        said.lines().find_map(|line| line.trim().strip_suffix(" passed")?.split(" generated").next()?.parse().ok());
    let generated: u32 = generated.unwrap_or_default();
    println!("{generated} requests");
    assert!(generated >= 10 * examples, "hardly anything was tried:\n{said}");
}

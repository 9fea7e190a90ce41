//! Settings of the stream that the durability of acknowledged writes depends on. They can change at any time.
//!
//! They are checked at the start, and whenever the leader is asked for the ends of the log. What would prevent a start does not
//! end a server: it is reported.
//!
//! Owns: the list of these settings. Must never know: what is written.

use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use tracing::{info, warn};

use super::Names;

/// Number of replicas without which the loss of one node can lose acknowledged writes.
pub const REPLICAS: u64 = 3;

/// Warnings about the settings.
pub struct Conditions {
    /// Weakened durability by the settings of the nodes, which are checked at the start only.
    nodes: Option<String>,
    /// Weakened durability, for the operator.
    warnings: Mutex<Vec<String>>,
}

impl Conditions {
    /// Checks the configuration of a stream that is to be used. An error is what a log cannot do with.
    pub fn new(config: &Value, names: &Names, nodes: Option<String>) -> Result<Self> {
        fits(config, names)?;
        let warnings = weaknesses(config, &names.stream).into_iter().chain(nodes.clone()).collect();
        Ok(Self { nodes, warnings: Mutex::new(warnings) })
    }

    /// Checks the configuration of the stream in use, and logs changes.
    pub fn note(&self, config: &Value, names: &Names) {
        let unfit = fits(config, names).err().map(|unfit| unfit.to_string());
        let weaknesses = weaknesses(config, &names.stream);
        let warnings: Vec<_> = unfit.into_iter().chain(weaknesses).chain(self.nodes.clone()).collect();
        let mut known = self.lock();
        for warning in warnings.iter().filter(|warning| !known.contains(warning)) {
            warn!("unsafe: {warning}");
        }
        for warning in known.iter().filter(|warning| !warnings.contains(warning)) {
            info!("resolved: {warning}");
        }
        *known = warnings;
    }

    /// Returns the warnings of the last check.
    pub fn warnings(&self) -> Vec<String> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<String>> {
        // Every change under this lock is whole.
        self.warnings.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Checks the settings that a log depends on.
fn fits(config: &Value, names: &Names) -> Result<()> {
    let stream = &names.stream;
    let text = |name: &str| config[name].as_str().unwrap_or_default();
    let limits = |name: &str| config[name].as_i64().is_some_and(|limit| limit > 0);
    ensure!(
        config["subjects"] == json!([names.subject]),
        "the subjects of {stream} are {}, but must be [{:?}]",
        config["subjects"],
        names.subject
    );
    ensure!(config["allow_direct"] == true, "allow_direct of {stream} is off: set it");
    ensure!(
        config["no_ack"] != true && config["sealed"] != true,
        "{stream} is sealed or has no_ack: it cannot be written to"
    );
    ensure!(text("retention") == "limits", "retention of {stream} is {:?}: it must be limits", text("retention"));
    for limit in ["max_msgs", "max_age", "max_msgs_per_subject", "max_msg_size"] {
        ensure!(
            !limits(limit),
            "{limit} of {stream} is set: the log would lose frames, or could not write some; remove it"
        );
    }
    ensure!(
        !limits("max_bytes") || text("discard") == "new",
        "discard of {stream} is {:?}: it must be new",
        text("discard")
    );
    Ok(())
}

/// Returns how the stream can lose acknowledged writes.
fn weaknesses(config: &Value, stream: &str) -> Vec<String> {
    let text = |name: &str| config[name].as_str().unwrap_or_default();
    let mut warnings = Vec::new();
    let replicas = config["num_replicas"].as_u64().unwrap_or_default();
    if replicas < REPLICAS {
        warnings.push(format!("num_replicas of {stream} is {replicas}: the loss of a node loses acknowledged writes; it must be {REPLICAS}"));
    }
    if text("storage") != "file" {
        warnings.push(format!(
            "storage of {stream} is {}: a power cut loses acknowledged writes; it must be file",
            text("storage")
        ));
    }
    if text("persist_mode") == "async" {
        warnings.push(format!(
            "persist_mode of {stream} is async: a power cut loses acknowledged writes; it must be default"
        ));
    }
    warnings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_that_lose_writes_are_found() {
        let names = Names::new("x");
        let good = json!({
            "subjects": ["kvs.x.00"], "allow_direct": true, "retention": "limits", "num_replicas": 3, "storage": "file",
            "discard": "new", "max_msgs": -1, "max_age": 0, "max_bytes": 1 << 30,
        });
        let of = |config: &Value| Ok::<_, anyhow::Error>(Conditions::new(config, &names, None)?.warnings());
        assert_eq!(of(&good).unwrap(), Vec::<String>::new());
        let with = |name: &str, value: Value| {
            let mut config = good.clone();
            config[name] = value;
            of(&config)
        };
        for (name, value) in
            [("num_replicas", json!(1)), ("storage", json!("memory")), ("persist_mode", json!("async"))]
        {
            let warnings = with(name, value).unwrap();
            assert!(warnings.len() == 1 && warnings[0].starts_with(name), "{warnings:?}");
        }
        let broken = [
            ("max_age", json!(5)),
            ("max_msgs", json!(5)),
            ("max_msgs_per_subject", json!(5)),
            ("max_msg_size", json!(5)),
            ("discard", json!("old")),
            ("retention", json!("workqueue")),
            ("allow_direct", json!(false)),
            ("subjects", json!(["other"])),
            ("sealed", json!(true)),
        ];
        for (name, value) in broken {
            let error = with(name, value).expect_err(name).to_string();
            assert!(error.contains(name), "{name}: {error}");
        }
    }

    #[test]
    fn settings_that_change_are_reported_with_those_of_nodes() {
        let names = Names::new("x");
        let config = |replicas: u64, age: u64| {
            json!({
                "subjects": ["kvs.x.00"], "allow_direct": true, "retention": "limits", "storage": "file",
                "num_replicas": replicas, "max_age": age,
            })
        };
        let conditions = Conditions::new(&config(3, 0), &names, Some("sync".into())).unwrap();
        let reported = |replicas, age| {
            conditions.note(&config(replicas, age), &names);
            let warnings = conditions.warnings();
            warnings.iter().map(|warning| warning.split(' ').next().unwrap_or_default().to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(reported(1, 0), ["num_replicas", "sync"]);
        assert_eq!(reported(1, 5), ["max_age", "num_replicas", "sync"]);
        assert_eq!(reported(3, 0), ["sync"]);
    }
}

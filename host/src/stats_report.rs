//! Statistics of a log as JSON, as the admin listener sends them, and as tables for people.

use anyhow::{Context, Result};
use bytesize::ByteSize;
use indicatif::HumanCount;
use kvs_txlog::stats::{LargeKey, LargePrefix, Query, Stats, Sum};
use serde_json::{Value, json};

/// Formats statistics as one object.
pub fn json(stats: &Stats, query: &Query) -> Value {
    let keys = |Sum { count, bytes }: Sum| json!({ "keys": count, "bytes": bytes });
    let entries = |Sum { count, bytes }: Sum| json!({ "entries": count, "bytes": bytes });
    let key =
        |large: &LargeKey| json!({ "key": large.key, "bytes": large.bytes, "sequence": large.sequence.to_string() });
    let prefix = |LargePrefix { prefix, keys }: &LargePrefix| json!({ "prefix": prefix, "keys": keys.count, "bytes": keys.bytes });
    let mut others = keys(stats.other_prefixed());
    others["prefixes"] = (stats.prefixes - stats.largest_prefixes.len() as u64).into();
    json!({
        "prefix": query.prefix,
        "delimiter": query.delimiter,
        "sequence": stats.sequence.to_string(),
        "exact": stats.is_exact,
        "passes": stats.passes,
        "live": keys(stats.live),
        "with_ttl": keys(stats.expiring),
        "log": entries(stats.entries),
        "garbage": entries(stats.garbage()),
        "largest_keys": stats.largest_keys.iter().map(key).collect::<Vec<_>>(),
        "largest_prefixes": stats.largest_prefixes.iter().map(prefix).collect::<Vec<_>>(),
        "other_prefixes": others,
        "without_delimiter": keys(stats.unprefixed()),
    })
}

/// Formats such an object as tables. Names come last and escaped, whatever characters a client has put into them.
pub fn tables(report: &Value) -> Result<String> {
    read(report).context("the server sent statistics of another format; use kvs of the same version, or --output json")
}

fn read(report: &Value) -> Option<String> {
    let number = |object: &Value, name: &str| Some(HumanCount(object.get(name)?.as_u64()?).to_string());
    let bytes = |object: &Value| Some(ByteSize(object.get("bytes")?.as_u64()?).to_string());
    let name = |object: &Value, name: &str| Some(format!("{:?}", object.get(name)?.as_str()?));
    let list = |name: &str| report.get(name)?.as_array();
    let keys = |sum: &Value, what: String| Some([number(sum, "keys")?, bytes(sum)?, what]);
    let entries = |sum: &Value, what: &str| Some([number(sum, "entries")?, bytes(sum)?, what.to_owned()]);

    let mut text = table(
        ["count", "bytes", "what"],
        vec![
            keys(report.get("live")?, "live keys".to_owned())?,
            keys(report.get("with_ttl")?, "of these with a TTL".to_owned())?,
            entries(report.get("log")?, "entries of the log")?,
            entries(report.get("garbage")?, "of these superseded, deleted or expired")?,
        ],
    );
    text.push_str(&format!("\nas of sequence {}", report.get("sequence")?.as_str()?));
    if !report.get("exact")?.as_bool()? {
        text.push_str("; the log was compacted meanwhile: keys that were overwritten or deleted since can be missing");
    }
    text.push('\n');

    let large = list("largest_keys")?;
    if !large.is_empty() {
        let row = |key: &Value| Some([bytes(key)?, key.get("sequence")?.as_str()?.to_owned(), name(key, "key")?]);
        text.push('\n');
        text += &table(["bytes", "sequence", "largest keys"], large.iter().map(row).collect::<Option<_>>()?);
    }
    let large = list("largest_prefixes")?;
    if !large.is_empty() {
        let row = |prefix: &Value| keys(prefix, name(prefix, "prefix")?);
        let mut rows = large.iter().map(row).collect::<Option<Vec<_>>>()?;
        let others = report.get("other_prefixes")?;
        if others.get("prefixes")?.as_u64()? > 0 {
            rows.push(keys(others, format!("{} other prefixes", number(others, "prefixes")?))?);
        }
        let rest = report.get("without_delimiter")?;
        if rest.get("keys")?.as_u64()? > 0 {
            rows.push(keys(rest, format!("without {}", name(report, "delimiter")?))?);
        }
        text.push('\n');
        text += &table(["keys", "bytes", "largest prefixes"], rows);
    }
    Some(text)
}

/// Two columns of numbers, aligned to the right, and one of text.
fn table(head: [&str; 3], rows: Vec<[String; 3]>) -> String {
    let mut rows = rows;
    rows.insert(0, head.map(str::to_owned));
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let (first, second) = (width(0), width(1));
    rows.iter().map(|[a, b, name]| format!("{a:>first$}  {b:>second$}  {name}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stats() -> Stats {
        let sum = |count, bytes| Sum { count, bytes };
        Stats {
            sequence: 1_200,
            is_exact: true,
            passes: 1,
            live: sum(1_100, 5 << 20),
            expiring: sum(1, 10),
            entries: sum(1_200, 6 << 20),
            largest_keys: vec![LargeKey { key: "a\n\u{202e}/b".into(), bytes: 4 << 20, sequence: 17 }],
            largest_prefixes: vec![LargePrefix { prefix: "a/".into(), keys: sum(1_000, 3 << 19) }],
            prefixes: 3,
            prefixed: sum(1_050, 2 << 20),
        }
    }

    fn query() -> Query {
        Query { prefix: String::new(), delimiter: "/".into(), top: 1, now: 0 }
    }

    #[test]
    fn tables_are_aligned_and_escaped() {
        let expected = "\
count    bytes  what
1,100  5.0 MiB  live keys
    1     10 B  of these with a TTL
1,200  6.0 MiB  entries of the log
  100  1.0 MiB  of these superseded, deleted or expired

as of sequence 1200

  bytes  sequence  largest keys
4.0 MiB        17  \"a\\n\\u{202e}/b\"

 keys      bytes  largest prefixes
1,000    1.5 MiB  \"a/\"
   50  512.0 KiB  2 other prefixes
   50    3.0 MiB  without \"/\"
";
        assert_eq!(tables(&json(&stats(), &query())).unwrap(), expected);
        let inexact = tables(&json(&Stats { is_exact: false, ..stats() }, &query())).unwrap();
        assert!(inexact.contains("sequence 1200; the log was compacted meanwhile"), "{inexact}");
        assert!(tables(&json!({ "live": 1 })).unwrap_err().to_string().contains("same version"));
    }
}

//! The plot of `just bench requests`: a bar for each server, for what it does in a second and what it takes for it.

use std::fmt::Write;

use crate::report::{Part, Table};

/// Sizes, in pixels.
const ROW: usize = 22;
const NAME: usize = 220;
const BAR: usize = 260;
const GAP: usize = 90;
const WIDTH: usize = NAME + 2 * (BAR + GAP);
const STYLE: &str = "text{font:12px sans-serif;fill:#1f2328}.h{font-weight:bold}.b{fill:#8c959f}.k{fill:#0969da}";

/// The first table, drawn.
pub fn of(requests: &Part) -> String {
    let Some(table) = requests.tables.first() else { return String::new() };
    let mut body = String::new();
    let mut y = 20;
    let _ = writeln!(body, r#"<text x="8" y="{y}">{}</text>"#, escaped(&table.title));
    for request in ["GET", "PUT"] {
        y = panel(&mut body, table, request, y + 30);
    }
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {y}\" width=\"{WIDTH}\" height=\"{y}\">\n\
         <style>{STYLE}</style>\n<rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n{body}</svg>\n"
    )
}

/// The servers that took one kind of request, below `y`. Returns where it ends.
fn panel(body: &mut String, table: &Table, request: &str, mut y: usize) -> usize {
    let rows = || table.rows.iter().filter(|row| row[0] == request);
    let value = |row: &[serde_json::Value], column: usize| row[column].as_f64().unwrap_or(0.0);
    let most = |column| rows().map(|row| value(row, column)).fold(1.0, f64::max);
    let columns = [(2, NAME, "requests a second"), (3, NAME + BAR + GAP, "server CPU, us a request")];
    let _ = writeln!(body, r#"<text class="h" x="8" y="{y}">{request}</text>"#);
    for (_, x, title) in columns {
        let _ = writeln!(body, r#"<text class="h" x="{x}" y="{y}">{title}</text>"#);
    }
    for row in rows() {
        let name = row[1].as_str().unwrap_or_default();
        let class = if name.starts_with("kvs") { "k" } else { "b" };
        let _ = writeln!(body, r#"<text x="8" y="{}">{}</text>"#, y + ROW, escaped(&name.replace('`', "")));
        for (column, x, _) in columns {
            let value = value(row, column);
            let width = (value / most(column) * BAR as f64).round();
            let _ = writeln!(
                body,
                r#"<rect class="{class}" x="{x}" y="{}" width="{width}" height="{}"/><text x="{}" y="{}">{value}</text>"#,
                y + ROW - 12,
                ROW - 6,
                x + width as usize + 6,
                y + ROW
            );
        }
        y += ROW;
    }
    y + ROW
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

//! The headers `Forwarded` (RFC 7239) and `X-Forwarded-For`.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use super::Node;

/// Returns the addresses in the lines of `Forwarded`, from the left. An error where a line is malformed: where its elements begin
/// is unknown then, and with that, which of them a proxy has added.
pub fn nodes(lines: &[&[u8]]) -> Result<Vec<Node>, ()> {
    let mut nodes = Vec::new();
    for line in lines {
        let line = str::from_utf8(line).ok().filter(|line| line.is_ascii()).ok_or(())?;
        add_nodes(line, &mut nodes).ok_or(())?;
    }
    Ok(nodes)
}

/// Returns the addresses in the lines of `X-Forwarded-For`, from the right.
pub fn x_nodes_from_right(lines: &[&[u8]]) -> impl Iterator<Item = Node> {
    let elements = lines.iter().rev().flat_map(|line| line.rsplit(|byte| *byte == b','));
    let elements = elements.map(<[u8]>::trim_ascii).filter(|element| !element.is_empty());
    elements.map(|element| str::from_utf8(element).ok().and_then(address))
}

/// Parses `1#([ pair ] *( ";" [ pair ] ))`, where elements can be empty.
fn add_nodes(line: &str, nodes: &mut Vec<Node>) -> Option<()> {
    let (mut rest, mut is_empty, mut node) = (line, true, None::<Node>);
    loop {
        rest = rest.trim_start();
        if !rest.starts_with([';', ',']) && !rest.is_empty() {
            let (name, after) = rest.split_once('=')?;
            let is_name =
                !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte));
            let (text, after) = value(after).filter(|_| is_name)?;
            if name.eq_ignore_ascii_case("for") && node.replace(address(&text)).is_some() {
                return None;
            }
            (rest, is_empty) = (after.trim_start(), false);
        }
        match rest.as_bytes().first() {
            Some(b';') => {}
            None | Some(b',') => {
                if !is_empty {
                    nodes.push(node.flatten());
                }
                (is_empty, node) = (true, None);
            }
            Some(_) => return None,
        }
        let Some(after) = rest.get(1..) else { return Some(()) };
        rest = after;
    }
}

/// Splits a value, quoted or not, from what follows it. Without quotes also characters that need them, except separators: there
/// are proxies that write `for=192.0.2.7:80`.
fn value(text: &str) -> Option<(String, &str)> {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find([',', ';', '"', ' ', '\t']).unwrap_or(text.len());
        let (value, rest) = text.split_at(end);
        return (!value.is_empty()).then(|| (value.to_owned(), rest));
    };
    let (mut value, mut characters) = (String::new(), quoted.char_indices());
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return Some((value, &quoted[at + 1..])),
            '\\' => value.push(characters.next()?.1),
            other => value.push(other),
        }
    }
    None
}

/// Parses an address with or without a port, which is 0 where it is unknown or obfuscated. An address with a zone is of the
/// proxy's own network, and means nothing here.
fn address(text: &str) -> Option<SocketAddr> {
    let text = text.rsplit_once(":_").map_or(text, |(address, _)| address);
    let bracketed = || text.strip_prefix('[')?.strip_suffix(']')?.parse::<Ipv6Addr>().ok().map(IpAddr::V6);
    let address = || Some(SocketAddr::new(text.parse().ok().or_else(bracketed)?, 0));
    let address = text.parse().ok().or_else(address).filter(|_| !text.contains('%'))?;
    Some(SocketAddr::new(address.ip().to_canonical(), address.port()))
}

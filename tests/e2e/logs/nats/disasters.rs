//! Power cuts of all nodes: nothing acknowledged is lost.

use std::thread;

use super::{Clients, End, args, get, put_until, start, texts};
use crate::support::load::count;
use crate::support::nats::Nodes;

#[test]
fn killed_nodes_and_server_lose_nothing() {
    let cuts = count("KVS_TEST_POWER_CUTS", 1);
    let mut nodes = Nodes::start(3);
    let args = args(&nodes);
    let mut server = start(&nodes);
    let mut all = Vec::new();
    for cut in 0..cuts {
        let clients = Clients::default();
        thread::scope(|scope| {
            let end = End(&clients);
            for client in 0..4 {
                let (server, clients) = (&server, &clients);
                scope.spawn(move || clients.write(server, 4 * cut as usize + client));
            }
            clients.grow(200);
            (0..3).for_each(|node| nodes.kill(node));
            drop(end);
        });
        // With frames in flight whose outcome it does not know.
        let killed = server.kill();
        (0..3).for_each(|node| nodes.restart(node));
        server = killed.restart(&texts(&args));
        all.extend(clients.acknowledged.into_inner().expect("nobody panics"));
        put_until(&server, 201, &format!("after-{cut}-"), "1");
        let lost = all.iter().filter(|key| get(&server, key) != (200, (*key).clone())).count();
        assert_eq!(lost, 0, "of {} acknowledged, after {} cuts", all.len(), cut + 1);
    }
    println!("{cuts} kills of all nodes and the server: {} writes acknowledged, 0 lost", all.len());
}

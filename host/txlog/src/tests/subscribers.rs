//! The queues of subscribers.

use std::sync::Arc;

use crate::change::Change;
use crate::subscribers::Queue;
use crate::{Event, Put};

#[tokio::test]
async fn slow_consumer_is_limited_by_bytes() {
    let queue = Queue::default();
    let push = |sequence| {
        let put = Put { key: "ab".into(), value: b"cde".into(), metadata: Vec::new(), expires: None };
        queue.push(&Arc::new(Change::new(sequence, 0, Event::Put(put))), 10);
    };
    [1, 2].into_iter().for_each(push);
    let next = queue.next().await.map(|change| change.sequence);
    assert_eq!(next, Some(1));
    [3, 4].into_iter().for_each(push);
    assert!(queue.next().await.is_none());
}

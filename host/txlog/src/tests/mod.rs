//! Tests of modules that are compiled twice: for use, and in `model`. A test in the module itself would be, too.

mod change_feed;
mod group_commit;
pub mod model;
mod subscribers;
mod watermark;

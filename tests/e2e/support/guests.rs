//! Guests for tests: files, bytes of components, and builds.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::LazyLock;

use kvs_tests::succeeds;
pub use kvs_tests::{DEFAULT_GUEST, built};
use wasm_encoder::{
    Component, ComponentExportKind, ComponentExportSection, ComponentImportSection, ComponentInstanceSection,
    ComponentTypeRef, ComponentTypeSection, InstanceType,
};

/// The bytes of a guest.
pub fn component(file: &str) -> Vec<u8> {
    fs::read(file).expect("the guest is built")
}

/// A copy of a component with other bytes and the same behaviour.
pub fn copy_of(file: &str) -> Vec<u8> {
    let mut bytes = component(file);
    // A custom section: id, length, the length of its name, its name.
    bytes.extend([0, 5, 4]);
    bytes.extend(b"copy");
    bytes
}

/// The file of the guest that misbehaves on demand (`tests/guests/unruly`), as an argument of `kvs serve`.
pub fn guest() -> &'static str {
    static GUEST: LazyLock<String> = LazyLock::new(|| built("unruly"));
    &GUEST
}

/// A component that imports an empty instance of this name.
pub fn importing(name: &str) -> Vec<u8> {
    let mut types = ComponentTypeSection::new();
    types.instance(&InstanceType::new());
    let mut imports = ComponentImportSection::new();
    imports.import(name, ComponentTypeRef::Instance(0));
    let mut component = Component::new();
    component.section(&types).section(&imports);
    component.finish()
}

/// A component that exports empty instances of these names.
pub fn exporting(names: &[&str]) -> Vec<u8> {
    let mut instances = ComponentInstanceSection::new();
    let mut exports = ComponentExportSection::new();
    for (index, name) in names.iter().enumerate() {
        instances.export_items([("", ComponentExportKind::Instance, 0); 0]);
        exports.export(*name, ComponentExportKind::Instance, u32::try_from(index).expect("a few"), None);
    }
    let mut component = Component::new();
    component.section(&instances).section(&exports);
    component.finish()
}

/// Path of the guest that is the built-in store and traps on demand.
pub fn brittle() -> &'static str {
    static GUEST: LazyLock<String> = LazyLock::new(|| built("brittle"));
    &GUEST
}

/// `just RECIPE` in the project's directory, or in a copy of it.
pub fn just(directory: &Path, recipe: &[&str]) {
    let mut just = Command::new("just");
    just.current_dir(directory).args(recipe);
    succeeds(just, recipe[0]);
}

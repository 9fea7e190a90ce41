//! Parts of WASI that standard libraries import whether they are used or not, and that have nothing behind them here: file
//! systems, sockets and HTTP. Each call is refused with an error of its own interface, since libraries probe.
//!
//! Defined by the types of the component that imports them, so that this host needs no definition of a hundred functions.
//!
//! Owns: refusals. Must never know: the log, requests, what is offered.

use wasmtime::component::types::{ComponentFunc, ComponentItem, Type};
use wasmtime::component::{Component, Linker, LinkerInstance, Resource, ResourceTable, ResourceType, Val};
use wasmtime::{Result, StoreContextMut, bail};

/// Beginnings of the names of their interfaces.
const PACKAGES: [&str; 3] = ["wasi:filesystem/", "wasi:sockets/", "wasi:http/"];

/// Error codes of these packages that say that something may not be done.
const REFUSALS: [&str; 4] = ["access", "access-denied", "HTTP-request-denied", "forbidden"];

/// What a function without an error returns a handle of: a network or a request, with which every call is refused.
struct Absent;

/// Handles of an instance, whose number is limited.
type Handles<T> = fn(&mut T) -> &mut ResourceTable;

pub fn is_absent(import: &str) -> bool {
    PACKAGES.iter().any(|package| import.starts_with(package))
}

/// Defines what a component imports of these packages.
pub fn add_to_linker<T: 'static>(linker: &mut Linker<T>, component: &Component, handles: Handles<T>) -> Result<()> {
    let engine = component.engine();
    let mut resources = Vec::new();
    for (interface, import) in component.component_type().imports(engine) {
        let ComponentItem::ComponentInstance(instance) = import.ty else { continue };
        for (name, item) in instance.exports(engine) {
            if let ComponentItem::Resource(resource) = item.ty {
                // An interface also names the resources of others that it uses; the first to name one defines it.
                if resources.contains(&resource) {
                    continue;
                }
                resources.push(resource);
            }
            if is_absent(interface) {
                define(&mut linker.instance(interface)?, interface, name, &item.ty, handles)?;
            }
        }
    }
    Ok(())
}

fn define<T: 'static>(
    linker: &mut LinkerInstance<'_, T>,
    interface: &str,
    name: &str,
    item: &ComponentItem,
    handles: Handles<T>,
) -> Result<()> {
    match item {
        ComponentItem::Resource(_) => {
            linker.resource(name, ResourceType::host::<Absent>(), move |mut store, handle| {
                handles(store.data_mut()).delete(Resource::<Absent>::new_own(handle))?;
                Ok(())
            })
        }
        ComponentItem::ComponentFunc(_) => {
            let path = format!("{interface}#{name}");
            linker.func_new(name, move |mut store, function, parameters, results| {
                // Handles that are passed are the host's until it drops them; a borrowed one that is left is a trap.
                parameters.iter().try_for_each(|parameter| drop_handles(&mut store, parameter))?;
                let Some(refusal) = refuse(store, &function, handles)? else {
                    bail!("{path} was called, which this host does not offer")
                };
                results.iter_mut().for_each(|result| *result = refusal.clone());
                Ok(())
            })
        }
        _ => Ok(()),
    }
}

/// Drops all handles in a value.
fn drop_handles<T: 'static>(store: &mut StoreContextMut<'_, T>, value: &Val) -> Result<()> {
    match value {
        Val::Resource(handle) => handle.resource_drop(store),
        Val::List(values) | Val::Tuple(values) => values.iter().try_for_each(|value| drop_handles(store, value)),
        Val::Record(fields) => fields.iter().try_for_each(|(_, value)| drop_handles(store, value)),
        Val::Variant(_, Some(value)) | Val::Option(Some(value)) | Val::Result(Ok(Some(value)) | Err(Some(value))) => {
            drop_handles(store, value)
        }
        _ => Ok(()),
    }
}

/// Returns the result of a refused call, where its type has one that says so or that is empty.
fn refuse<T: 'static>(
    mut store: StoreContextMut<'_, T>,
    function: &ComponentFunc,
    handles: Handles<T>,
) -> Result<Option<Val>> {
    Ok(match function.results().next() {
        Some(Type::List(_)) => Some(Val::List(Vec::new())),
        Some(Type::Result(result)) => match result.err() {
            None => Some(Val::Result(Err(None))),
            Some(error) => refusal(&error).map(|error| Val::Result(Err(Some(Box::new(error))))),
        },
        Some(Type::Own(_)) => {
            let handle = handles(store.data_mut()).push(Absent)?;
            Some(Val::Resource(handle.try_into_resource_any(&mut store)?))
        }
        _ => None,
    })
}

/// Returns the case of an error type that says that something may not be done.
fn refusal(error: &Type) -> Option<Val> {
    let is_refusal = |name: &str| REFUSALS.contains(&name);
    match error {
        Type::Enum(error) => error.names().find(|name| is_refusal(name)).map(|name| Val::Enum(name.to_owned())),
        Type::Variant(error) => {
            let case = error.cases().find(|case| case.ty.is_none() && is_refusal(case.name))?;
            Some(Val::Variant(case.name.to_owned(), None))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use wasmtime::{AsContextMut, Engine, Store};

    use super::*;

    #[test]
    fn handles_inside_of_values_are_dropped() {
        let wraps: [fn(Val) -> Val; 8] = [
            |handle| handle,
            |handle| Val::List(vec![Val::Bool(true), handle]),
            |handle| Val::Tuple(vec![Val::Bool(true), handle]),
            |handle| Val::Record(vec![("name".to_owned(), handle)]),
            |handle| Val::Variant("name".to_owned(), Some(Box::new(handle))),
            |handle| Val::Option(Some(Box::new(handle))),
            |handle| Val::Result(Ok(Some(Box::new(handle)))),
            |handle| Val::Result(Err(Some(Box::new(Val::List(vec![handle]))))),
        ];
        let mut store = Store::new(&Engine::default(), ());
        for (number, wrap) in wraps.into_iter().enumerate() {
            let handle = Resource::<Absent>::new_own(7).try_into_resource_any(&mut store).expect("there is room");
            drop_handles(&mut store.as_context_mut(), &wrap(Val::Resource(handle))).expect("it can be dropped");
            handle.resource_drop(&mut store).expect_err(&format!("value {number} still has its handle"));
        }
    }
}

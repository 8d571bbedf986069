//! The only unsafe code of the crate: the calls of libvirt's C library that crate `virt` 0.4 does not wrap, or wraps
//! with a leak (statistics records).
//!
//! Rules: no pointer leaves this module; strings and numbers are copied out before the C memory is given back; a
//! callback never unwinds into C.

#![allow(unsafe_code)]

use std::collections::HashMap;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;
use std::sync::Arc;

use uuid::Uuid;
use virt::connect::Connect;
use virt::error::Error;
use virt_sys as sys;

/// An event as libvirt tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum RawEvent {
    Lifecycle { domain: Uuid, event: u32, detail: i32 },
    Reboot { domain: Uuid },
    IoError { domain: Uuid, alias: String, reason: String },
    Agent { domain: Uuid, state: u32 },
    Closed,
}

/// Called on the event thread; must not block and must not call libvirt back with a wait.
pub(super) type Sink = Arc<dyn Fn(RawEvent) + Send + Sync>;

/// Registered callbacks; dropping it takes them away.
pub(super) struct EventRegistration {
    connection: Connect,
    ids: Vec<c_int>,
    close_callback: bool,
}

/// One value of a statistics record.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    Number(u64),
    Text(String),
}

/// All values of one domain by libvirt's names (`cpu.time`, `block.0.rd.reqs`).
pub(super) struct StatsRecord {
    pub(super) domain: Uuid,
    pub(super) values: HashMap<String, Value>,
}

/// # Safety
/// `domain` must be null or a live libvirt domain object.
unsafe fn domain_uuid(domain: sys::virDomainPtr) -> Option<Uuid> {
    let mut bytes = [0u8; 16];
    // SAFETY: the buffer has VIR_UUID_BUFLEN = 16 bytes; libvirt checks the object pointer it is given.
    let result = unsafe { sys::virDomainGetUUID(domain, bytes.as_mut_ptr()) };
    (result == 0).then(|| Uuid::from_bytes(bytes))
}

/// # Safety
/// `text` must be null or point to a zero-terminated string that lives during the call.
unsafe fn copy_text(text: *const c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: by the caller's promise.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

/// # Safety
/// `opaque` must be the `Box<Sink>` made by `opaque_sink`, not freed yet.
unsafe fn deliver(opaque: *mut c_void, event: Option<RawEvent>) {
    let Some(event) = event else { return };
    // SAFETY: libvirt hands back the pointer given at registration and calls `free_sink` only after the last callback.
    let sink = unsafe { &*opaque.cast::<Sink>() };
    if catch_unwind(AssertUnwindSafe(|| sink(event))).is_err() {
        tracing::error!("a hypervisor event callback panicked");
    }
}

unsafe extern "C" fn on_lifecycle(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    event: c_int,
    detail: c_int,
    opaque: *mut c_void,
) -> c_int {
    // SAFETY: libvirt passes a live domain for the time of the callback, and our own opaque pointer.
    unsafe {
        let event = domain_uuid(domain).map(|domain| RawEvent::Lifecycle { domain, event: event as u32, detail });
        deliver(opaque, event);
    }
    0
}

unsafe extern "C" fn on_reboot(_: sys::virConnectPtr, domain: sys::virDomainPtr, opaque: *mut c_void) {
    // SAFETY: as in `on_lifecycle`.
    unsafe { deliver(opaque, domain_uuid(domain).map(|domain| RawEvent::Reboot { domain })) }
}

unsafe extern "C" fn on_io_error(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    _source: *const c_char,
    alias: *const c_char,
    _action: c_int,
    reason: *const c_char,
    opaque: *mut c_void,
) {
    // SAFETY: as in `on_lifecycle`; alias and reason are strings libvirt owns during the callback.
    unsafe {
        let (alias, reason) = (copy_text(alias), copy_text(reason));
        deliver(opaque, domain_uuid(domain).map(|domain| RawEvent::IoError { domain, alias, reason }));
    }
}

unsafe extern "C" fn on_agent(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    state: c_int,
    _reason: c_int,
    opaque: *mut c_void,
) {
    // SAFETY: as in `on_lifecycle`.
    unsafe { deliver(opaque, domain_uuid(domain).map(|domain| RawEvent::Agent { domain, state: state as u32 })) }
}

unsafe extern "C" fn on_close(_: sys::virConnectPtr, _reason: c_int, opaque: *mut c_void) {
    // SAFETY: our own opaque pointer.
    unsafe { deliver(opaque, Some(RawEvent::Closed)) }
}

unsafe extern "C" fn free_sink(opaque: *mut c_void) {
    // SAFETY: called once by libvirt for each successful registration, after its last callback.
    drop(unsafe { Box::from_raw(opaque.cast::<Sink>()) });
}

fn opaque_sink(sink: &Sink) -> *mut c_void {
    Box::into_raw(Box::new(sink.clone())).cast()
}

impl EventRegistration {
    /// Subscribes to everything [`RawEvent`] names. An event the driver does not have is left out.
    pub(super) fn register(connection: &Connect, sink: &Sink) -> Self {
        let mut registration = Self { connection: connection.clone(), ids: Vec::new(), close_callback: false };
        // SAFETY: each function has the C signature libvirt documents for its event id; the generic callback type
        // erases exactly that signature, and libvirt calls it with the arguments of the event id given beside it.
        let callbacks = unsafe {
            [
                (
                    sys::VIR_DOMAIN_EVENT_ID_LIFECYCLE,
                    std::mem::transmute::<sys::virConnectDomainEventCallback, sys::virConnectDomainEventGenericCallback>(
                        Some(on_lifecycle),
                    ),
                ),
                (sys::VIR_DOMAIN_EVENT_ID_REBOOT, Some(on_reboot as _)),
                (
                    sys::VIR_DOMAIN_EVENT_ID_IO_ERROR_REASON,
                    std::mem::transmute::<
                        sys::virConnectDomainEventIOErrorReasonCallback,
                        sys::virConnectDomainEventGenericCallback,
                    >(Some(on_io_error)),
                ),
                (
                    sys::VIR_DOMAIN_EVENT_ID_AGENT_LIFECYCLE,
                    std::mem::transmute::<
                        sys::virConnectDomainEventAgentLifecycleCallback,
                        sys::virConnectDomainEventGenericCallback,
                    >(Some(on_agent)),
                ),
            ]
        };
        for (event, callback) in callbacks {
            let opaque = opaque_sink(sink);
            // SAFETY: the connection lives as long as `registration` (it holds a reference); null domain = all domains.
            let id = unsafe {
                sys::virConnectDomainEventRegisterAny(
                    registration.connection.as_ptr(),
                    ptr::null_mut(),
                    event as c_int,
                    callback,
                    opaque,
                    Some(free_sink),
                )
            };
            if id < 0 {
                tracing::debug!(event, err = %Error::last_error(), "hypervisor has no such event");
                // SAFETY: a refused registration leaves the opaque pointer ours.
                unsafe { free_sink(opaque) };
            } else {
                registration.ids.push(id);
            }
        }
        let opaque = opaque_sink(sink);
        // SAFETY: as above; one close callback per connection, this connection is ours alone.
        let result = unsafe {
            sys::virConnectRegisterCloseCallback(
                registration.connection.as_ptr(),
                Some(on_close),
                opaque,
                Some(free_sink),
            )
        };
        if result < 0 {
            // SAFETY: a refused registration leaves the opaque pointer ours.
            unsafe { free_sink(opaque) };
        } else {
            registration.close_callback = true;
        }
        registration
    }
}

impl Drop for EventRegistration {
    fn drop(&mut self) {
        for id in self.ids.drain(..) {
            // SAFETY: the id came from this connection, which we still hold.
            unsafe { sys::virConnectDomainEventDeregisterAny(self.connection.as_ptr(), id) };
        }
        if self.close_callback {
            // SAFETY: registered on this connection in `register`.
            unsafe { sys::virConnectUnregisterCloseCallback(self.connection.as_ptr(), Some(on_close)) };
        }
    }
}

/// Statistics of all domains, or of one. `flags` are `VIR_CONNECT_GET_ALL_DOMAINS_STATS_*`.
pub(super) fn domain_stats(
    connection: &Connect,
    domain: Option<&virt::domain::Domain>,
    stats: u32,
    flags: u32,
) -> Result<Vec<StatsRecord>, Error> {
    let mut records: *mut sys::virDomainStatsRecordPtr = ptr::null_mut();
    let count = match domain {
        None => {
            // SAFETY: live connection, valid out pointer.
            unsafe { sys::virConnectGetAllDomainStats(connection.as_ptr(), stats, &mut records, flags) }
        }
        Some(domain) => {
            let mut list = [domain.as_ptr(), ptr::null_mut()];
            // SAFETY: a null-terminated list of live domains, valid out pointer.
            unsafe { sys::virDomainListGetStats(list.as_mut_ptr(), stats, &mut records, flags) }
        }
    };
    if count < 0 {
        return Err(Error::last_error());
    }
    let mut out = Vec::with_capacity(count as usize);
    for index in 0..count as usize {
        // SAFETY: libvirt returned `count` records, each with `nparams` parameters; they live until the free below.
        unsafe {
            let record = &**records.add(index);
            let Some(domain) = domain_uuid(record.dom) else {
                continue;
            };
            let mut values = HashMap::with_capacity(record.nparams as usize);
            for parameter in 0..record.nparams as usize {
                let parameter = &*record.params.add(parameter);
                let name = copy_text(parameter.field.as_ptr());
                let value = match parameter.type_ as u32 {
                    sys::VIR_TYPED_PARAM_INT => Value::Number(parameter.value.i.max(0) as u64),
                    sys::VIR_TYPED_PARAM_UINT => Value::Number(u64::from(parameter.value.ui)),
                    sys::VIR_TYPED_PARAM_LLONG => Value::Number(parameter.value.l.max(0) as u64),
                    sys::VIR_TYPED_PARAM_ULLONG => Value::Number(parameter.value.ul),
                    sys::VIR_TYPED_PARAM_BOOLEAN => Value::Number(u64::from(parameter.value.b != 0)),
                    sys::VIR_TYPED_PARAM_STRING => Value::Text(copy_text(parameter.value.s)),
                    _ => continue,
                };
                values.insert(name, value);
            }
            out.push(StatsRecord { domain, values });
        }
    }
    // SAFETY: the list libvirt allocated, given back once; it releases records, parameters and domain references.
    unsafe { sys::virDomainStatsRecordListFree(records) };
    Ok(out)
}

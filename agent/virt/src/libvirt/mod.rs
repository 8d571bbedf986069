//! libvirt's drivers behind [`Hypervisor`]: the embedded QEMU driver, the system daemon, the mock.

mod embed;
mod event_loop;
mod ffi;
mod guest;
mod mapping;
mod vhost_user;
pub mod xml;

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crossbeam_channel::Receiver;
use muster_common::Chain;
use muster_common::id::VmId;
use muster_common::units::ByteLen;
use parking_lot::Mutex;
use serde_json::{Value, json};
use virt::connect::Connect;
use virt::domain::Domain;
use virt::error::{Error, ErrorNumber};
use virt::stream::Stream;
use virt_sys as sys;

pub use embed::MAX_ROOT_LENGTH;

use crate::error::{HypervisorError, HypervisorErrorKind, Result};
use crate::hypervisor::{Capabilities, Hypervisor, HypervisorInfo, HypervisorKind, ShutdownMode};
use crate::screenshot::Screenshot;
use crate::spec::DomainSpec;
use crate::state::{
    BlockStats, DomainState, DomainStats, DomainStatus, ExecRequest, ExecResult, HypervisorEvent, NetStats,
};
use crate::subscribers::Subscribers;
use ffi::{EventRegistration, RawEvent, Sink, StatsRecord};
use mapping::{failed, kind_of, lifecycle_event, state_of};

/// A picture of the largest screen a VGA adapter with 16 MiB shows, and then some.
const SCREENSHOT_LIMIT: usize = 64 << 20;

/// A connection to libvirt.
pub(crate) struct Libvirt {
    /// Before the connection: deregisters first when dropped.
    _events: EventRegistration,
    connection: Connect,
    info: HypervisorInfo,
    agent_sockets: Option<PathBuf>,
    subscribers: Arc<Subscribers>,
    /// The daemon went away: libvirt answers every later call with an untyped error.
    lost: Arc<AtomicBool>,
    /// Domains known to carry our metadata. Only grows by what exists: undefine takes out.
    ours: Mutex<HashSet<VmId>>,
}

impl Libvirt {
    pub(crate) fn open(uri: &str) -> Result<Self> {
        let scheme = uri.split(['?', ':']).next().unwrap_or_default();
        let embedded = uri.starts_with("qemu:///embed");
        let kind = match scheme {
            "test" => HypervisorKind::LibvirtTest,
            _ if embedded => HypervisorKind::QemuEmbedded,
            _ => HypervisorKind::QemuSystem,
        };
        let mut agent_sockets = None;
        if embedded {
            let root = embed::root_of(uri)?;
            embed::prepare(&root)?;
            agent_sockets = Some(embed::agent_sockets(&root));
        }
        event_loop::start()?;
        let connection = Connect::open(Some(uri)).map_err(|e| open_failed(uri, kind, e))?;
        // the driver probes QEMU lazily, which would cost the first start four seconds: make it do so now
        let capabilities_xml =
            connection.get_capabilities().map_err(|e| failed(&format!("ask {uri} for its capabilities"), e))?;
        if kind != HypervisorKind::LibvirtTest && !capabilities_xml.contains("<guest>") {
            return Err(HypervisorError::new(
                HypervisorErrorKind::NotInstalled,
                format!("open hypervisor {uri}: libvirt finds no QEMU; install qemu-system-x86"),
            ));
        }
        let version = |raw: u32| format!("{}.{}.{}", raw / 1_000_000, raw / 1000 % 1000, raw % 1000);
        let real = kind != HypervisorKind::LibvirtTest;
        let info = HypervisorInfo {
            kind,
            uri: uri.to_owned(),
            library_version: connection.get_lib_version().map(version).unwrap_or_default(),
            hypervisor_version: connection.get_hyp_version().map(version).unwrap_or_default(),
            guest_arch: std::env::consts::ARCH.to_owned(),
            capabilities: Capabilities {
                guest_agent: real,
                screenshot: real,
                managed_save: true,
                reset: true,
                start_paused: real,
                device_stats: real,
                survives_restart: real,
                migration_destination: kind == HypervisorKind::QemuSystem,
            },
        };
        let subscribers = Arc::new(Subscribers::default());
        let target = subscribers.clone();
        let lost = Arc::new(AtomicBool::new(false));
        let closed = lost.clone();
        let sink: Sink = Arc::new(move |raw| {
            if raw == RawEvent::Closed {
                closed.store(true, Ordering::Release);
            }
            if let Some(event) = translate(raw) {
                target.publish(&event);
            }
        });
        let events = EventRegistration::register(&connection, &sink);
        Ok(Self {
            _events: events,
            connection,
            info,
            agent_sockets,
            subscribers,
            lost,
            ours: Mutex::new(HashSet::new()),
        })
    }

    fn is_test(&self) -> bool {
        self.info.kind == HypervisorKind::LibvirtTest
    }

    fn connected(&self) -> Result<()> {
        if !self.lost.load(Ordering::Acquire) {
            return Ok(());
        }
        let text = format!("use hypervisor {}: the connection is lost", self.info.uri);
        Err(HypervisorError::new(HypervisorErrorKind::Connection, text))
    }

    /// Any domain of that id.
    fn lookup(&self, vm: VmId) -> Result<Domain> {
        self.connected()?;
        Domain::lookup_by_uuid(&self.connection, vm.uuid()).map_err(|e| match e.code() {
            ErrorNumber::NoDomain => HypervisorError::not_found(vm),
            _ => failed(&format!("find domain {vm}"), e),
        })
    }

    /// A domain of ours; somebody else's does not exist for the verbs.
    fn find(&self, vm: VmId) -> Result<Domain> {
        let domain = self.lookup(vm)?;
        if self.is_ours(vm, &domain)? { Ok(domain) } else { Err(HypervisorError::not_found(vm)) }
    }

    /// Runs one call on one domain.
    fn on<T>(&self, vm: VmId, what: &str, call: impl FnOnce(&Domain) -> Result<T, Error>) -> Result<T> {
        let domain = self.find(vm)?;
        call(&domain).map_err(|e| failed(&format!("{what} domain {vm}"), e))
    }

    /// As `on`, for calls that need a process. The QEMU driver checks it too; the mock answers with untyped errors.
    fn on_active<T>(&self, vm: VmId, what: &str, call: impl FnOnce(&Domain) -> Result<T, Error>) -> Result<T> {
        self.on(vm, what, |domain| Ok(if domain.is_active()? { Some(call(domain)?) } else { None }))?.ok_or_else(|| {
            HypervisorError::new(HypervisorErrorKind::InvalidState, format!("{what} domain {vm}: it is off"))
        })
    }

    fn is_ours(&self, vm: VmId, domain: &Domain) -> Result<bool> {
        if self.ours.lock().contains(&vm) {
            return Ok(true);
        }
        let element = sys::VIR_DOMAIN_METADATA_ELEMENT as i32;
        match domain.get_metadata(element, Some(xml::METADATA_NAMESPACE), 0) {
            Ok(_) => {
                self.ours.lock().insert(vm);
                Ok(true)
            }
            Err(e) if e.code() == ErrorNumber::NoDomainMetadata => Ok(false),
            Err(e) => Err(failed(&format!("read metadata of domain {vm}"), e)),
        }
    }

    fn status_of(&self, vm: VmId, domain: &Domain) -> Result<DomainStatus> {
        let context = || format!("read state of domain {vm}");
        let (raw, reason) = domain.get_state().map_err(|e| failed(&context(), e))?;
        let off = raw == sys::VIR_DOMAIN_SHUTOFF;
        let saved = off && domain.has_managed_save(0).unwrap_or(false);
        let (state, reason) = state_of(raw, reason, saved);
        let agent_connected = match state {
            _ if self.is_test() => None,
            DomainState::Running | DomainState::Paused | DomainState::ShuttingDown => {
                domain.get_xml_desc(0).ok().map(|xml| agent_channel_open(&xml))
            }
            _ => Some(false),
        };
        Ok(DomainStatus {
            vm,
            name: domain.get_name().map_err(|e| failed(&context(), e))?,
            state,
            reason,
            persistent: domain.is_persistent().map_err(|e| failed(&context(), e))?,
            ours: self.is_ours(vm, domain)?,
            agent_connected,
        })
    }

    fn create(&self, vm: VmId, flags: u32) -> Result<()> {
        let context = format!("start domain {vm}");
        let domain = self.find(vm)?;
        let fail = |e| failed(&context, e);
        if domain.is_active().map_err(fail)? {
            return Err(HypervisorError::new(HypervisorErrorKind::InvalidState, format!("{context}: it is active")));
        }
        if !self.is_test() {
            let definition = domain.get_xml_desc(sys::VIR_DOMAIN_XML_INACTIVE).map_err(fail)?;
            vhost_user::check_servers(&context, &definition)?;
        }
        domain.create_with_flags(flags).map(drop).map_err(fail)
    }

    fn agent_command(&self, vm: VmId, domain: &Domain, command: &Value, timeout: Duration) -> Result<Value> {
        // whole seconds, and 0 would mean "do not wait for an answer"
        let seconds = timeout.as_secs_f64().ceil().clamp(1.0, 3600.0) as i32;
        let answer = domain.qemu_agent_command(&command.to_string(), seconds, 0).map_err(|e| {
            let kind = match kind_of(&e) {
                // "guest agent is not configured"
                HypervisorErrorKind::Unsupported if !self.is_test() => HypervisorErrorKind::AgentUnavailable,
                // libvirt 9 passes an error the agent answered with as its own internal error
                _ if e.code() == ErrorNumber::InternalError => HypervisorErrorKind::GuestFailed,
                kind => kind,
            };
            let name = command["execute"].as_str().unwrap_or_default();
            HypervisorError::with_source(kind, format!("{name} in the guest of domain {vm}"), e)
        })?;
        guest::parse_answer(&answer)
    }

    /// Runs one conversation with the guest agent.
    fn with_agent<T>(&self, vm: VmId, talk: impl FnOnce(guest::Command<'_>) -> Result<T>) -> Result<T> {
        let domain = self.find(vm)?;
        talk(&|command, timeout| self.agent_command(vm, &domain, command, timeout))
    }

    fn statistics(&self, domain: Option<&Domain>) -> Result<Vec<StatsRecord>> {
        let wanted = sys::VIR_DOMAIN_STATS_STATE
            | sys::VIR_DOMAIN_STATS_CPU_TOTAL
            | sys::VIR_DOMAIN_STATS_BALLOON
            | sys::VIR_DOMAIN_STATS_VCPU
            | sys::VIR_DOMAIN_STATS_INTERFACE
            | sys::VIR_DOMAIN_STATS_BLOCK;
        // a domain whose monitor hangs answers with less instead of making everybody wait
        let mut flags = sys::VIR_CONNECT_GET_ALL_DOMAINS_STATS_NOWAIT;
        if domain.is_none() {
            flags |= sys::VIR_CONNECT_GET_ALL_DOMAINS_STATS_ACTIVE;
        }
        ffi::domain_stats(&self.connection, domain, wanted, flags).map_err(|e| failed("read domain statistics", e))
    }

    fn info_stats(&self, vm: VmId, domain: &Domain) -> Result<DomainStats> {
        let info = domain.get_info().map_err(|e| failed(&format!("read statistics of domain {vm}"), e))?;
        Ok(DomainStats {
            vm,
            state: state_of(info.state, 0, false).0,
            cpu_time_ns: info.cpu_time,
            vcpus: info.nr_virt_cpu,
            memory: Some(ByteLen::kib(info.memory)),
            memory_maximum: Some(ByteLen::kib(info.max_mem)),
            memory_resident: None,
            memory_usable: None,
            block: Vec::new(),
            net: Vec::new(),
        })
    }
}

/// libvirt writes the target's attributes in this order, and escapes quotes in every text a user can give.
fn agent_channel_open(xml: &str) -> bool {
    xml.contains(&format!("name='{}' state='connected'", xml::AGENT_CHANNEL))
}

fn open_failed(uri: &str, kind: HypervisorKind, e: Error) -> HypervisorError {
    let no_driver = e.code() == ErrorNumber::NoConnect || e.code() == ErrorNumber::NoSupport;
    // qemu.conf's defaults name a user that a package creates; it is looked up even when overridden
    let no_user = e.message().contains("parse user") || e.message().contains("parse group");
    let (kind, hint) = match kind {
        HypervisorKind::QemuEmbedded if no_user => (HypervisorErrorKind::NotInstalled, "install libvirt-daemon-system"),
        HypervisorKind::QemuEmbedded if no_driver => {
            (HypervisorErrorKind::NotInstalled, "install libvirt-daemon-driver-qemu and qemu-system-x86")
        }
        HypervisorKind::QemuSystem => {
            (HypervisorErrorKind::Connection, "is libvirtd running? It comes with libvirt-daemon-system")
        }
        _ => (HypervisorErrorKind::Connection, "see the cause"),
    };
    HypervisorError::with_source(kind, format!("open hypervisor {uri}: {hint}"), e)
}

fn translate(raw: RawEvent) -> Option<HypervisorEvent> {
    Some(match raw {
        RawEvent::Lifecycle { domain, event, detail } => {
            let (state, reason) = lifecycle_event(event, detail)?;
            HypervisorEvent::Lifecycle { vm: VmId::from_uuid(domain), state, reason }
        }
        RawEvent::Reboot { domain } => HypervisorEvent::Rebooted { vm: VmId::from_uuid(domain) },
        RawEvent::IoError { domain, alias, reason } => HypervisorEvent::IoError {
            vm: VmId::from_uuid(domain),
            disk: alias,
            // the one reason that QEMU's driver gives
            no_space: reason == "enospc",
        },
        RawEvent::Agent { domain, state } => HypervisorEvent::GuestAgent {
            vm: VmId::from_uuid(domain),
            connected: state == sys::VIR_CONNECT_DOMAIN_EVENT_AGENT_LIFECYCLE_STATE_CONNECTED,
        },
        RawEvent::Closed => HypervisorEvent::ConnectionLost,
    })
}

fn stats_from(record: &StatsRecord) -> DomainStats {
    let number = |name: &str| match record.values.get(name) {
        Some(ffi::Value::Number(n)) => Some(*n),
        _ => None,
    };
    let text = |name: &str| match record.values.get(name) {
        Some(ffi::Value::Text(text)) => text.clone(),
        _ => String::new(),
    };
    let kib = |name: &str| number(name).and_then(|n| n.checked_mul(1024)).map(ByteLen);
    let count = |name: &str| number(name).unwrap_or(0);
    let state = number("state.state").map_or(DomainState::Unknown, |state| {
        state_of(state as u32, number("state.reason").unwrap_or(0) as i32, false).0
    });
    DomainStats {
        vm: VmId::from_uuid(record.domain),
        state,
        cpu_time_ns: count("cpu.time"),
        vcpus: count("vcpu.current") as u32,
        memory: kib("balloon.current"),
        memory_maximum: kib("balloon.maximum"),
        memory_resident: kib("balloon.rss"),
        memory_usable: kib("balloon.usable"),
        block: (0..count("block.count"))
            // libvirt lists a vhost-user disk without a single counter: the requests do not pass through QEMU
            .filter(|n| number(&format!("block.{n}.rd.reqs")).is_some())
            .map(|n| BlockStats {
                target: text(&format!("block.{n}.name")),
                read_requests: count(&format!("block.{n}.rd.reqs")),
                read_bytes: count(&format!("block.{n}.rd.bytes")),
                write_requests: count(&format!("block.{n}.wr.reqs")),
                write_bytes: count(&format!("block.{n}.wr.bytes")),
                flush_requests: count(&format!("block.{n}.fl.reqs")),
            })
            .collect(),
        net: (0..count("net.count"))
            .map(|n| NetStats {
                device: text(&format!("net.{n}.name")),
                received_bytes: count(&format!("net.{n}.rx.bytes")),
                received_packets: count(&format!("net.{n}.rx.pkts")),
                sent_bytes: count(&format!("net.{n}.tx.bytes")),
                sent_packets: count(&format!("net.{n}.tx.pkts")),
            })
            .collect(),
    }
}

impl Hypervisor for Libvirt {
    fn info(&self) -> HypervisorInfo {
        self.info.clone()
    }

    fn define(&self, spec: &DomainSpec) -> Result<()> {
        let flavour = match self.is_test() {
            true => xml::Flavour::Test,
            false => xml::Flavour::Qemu { agent_sockets: self.agent_sockets.as_deref() },
        };
        let xml = xml::domain_xml(spec, flavour)?;
        let context = format!("define domain {} ({})", spec.vm, spec.name);
        if let Ok(present) = self.lookup(spec.vm) {
            if !self.is_ours(spec.vm, &present)? {
                return Err(HypervisorError::new(
                    HypervisorErrorKind::AlreadyExists,
                    format!("{context}: a domain of that id exists and is not ours"),
                ));
            }
            let name = present.get_name().map_err(|e| failed(&context, e))?;
            if name != spec.name {
                present.rename(&spec.name, 0).map_err(|e| failed(&context, e))?;
            }
        } else if Domain::lookup_by_name(&self.connection, &spec.name).is_ok() {
            return Err(HypervisorError::new(
                HypervisorErrorKind::AlreadyExists,
                format!("{context}: another domain has that name"),
            ));
        }
        Domain::define_xml(&self.connection, &xml).map_err(|e| failed(&context, e))?;
        self.ours.lock().insert(spec.vm);
        Ok(())
    }

    fn undefine(&self, vm: VmId) -> Result<()> {
        let domain = self.find(vm)?;
        let context = format!("undefine domain {vm}");
        if domain.is_active().map_err(|e| failed(&context, e))? {
            // libvirt would make it a transient domain, which nobody here wants
            return Err(HypervisorError::new(HypervisorErrorKind::InvalidState, format!("{context}: it is active")));
        }
        let flags = if self.is_test() {
            sys::VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
        } else {
            sys::VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
                | sys::VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
                | sys::VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
                | sys::VIR_DOMAIN_UNDEFINE_NVRAM
        };
        domain.undefine_flags(flags).map_err(|e| failed(&context, e))?;
        self.ours.lock().remove(&vm);
        Ok(())
    }

    fn list(&self) -> Result<Vec<DomainStatus>> {
        self.connected()?;
        let domains = self.connection.list_all_domains(0).map_err(|e| failed("list domains", e))?;
        let mut rows = Vec::with_capacity(domains.len());
        for domain in &domains {
            let uuid = domain.get_uuid().map_err(|e| failed("list domains", e))?;
            match self.status_of(VmId::from_uuid(uuid), domain) {
                Ok(row) => rows.push(row),
                // went away meanwhile
                Err(e) if e.kind() == HypervisorErrorKind::NotFound => {}
                Err(e) => return Err(e),
            }
        }
        let present: HashSet<VmId> = rows.iter().map(|row| row.vm).collect();
        self.ours.lock().retain(|vm| present.contains(vm));
        Ok(rows)
    }

    fn status(&self, vm: VmId) -> Result<DomainStatus> {
        self.status_of(vm, &self.lookup(vm)?)
    }

    fn start(&self, vm: VmId) -> Result<()> {
        self.create(vm, 0)
    }

    fn start_paused(&self, vm: VmId) -> Result<()> {
        if self.is_test() {
            return Err(HypervisorError::unsupported("a paused start"));
        }
        self.create(vm, sys::VIR_DOMAIN_START_PAUSED)
    }

    fn shutdown(&self, vm: VmId, mode: ShutdownMode) -> Result<()> {
        let flags = match mode {
            ShutdownMode::Agent if self.is_test() => {
                return Err(HypervisorError::unsupported("the guest agent"));
            }
            ShutdownMode::Acpi if self.is_test() => sys::VIR_DOMAIN_SHUTDOWN_DEFAULT,
            ShutdownMode::Agent => sys::VIR_DOMAIN_SHUTDOWN_GUEST_AGENT,
            ShutdownMode::Acpi => sys::VIR_DOMAIN_SHUTDOWN_ACPI_POWER_BTN,
        };
        self.on_active(vm, "shut down", |domain| domain.shutdown_flags(flags))
            .map(drop)
            .or_else(already_going_down)
            .map_err(agent_missing(mode))
    }

    fn power_off(&self, vm: VmId) -> Result<()> {
        self.on_active(vm, "power off", Domain::destroy)
    }

    fn reset(&self, vm: VmId) -> Result<()> {
        self.on_active(vm, "reset", Domain::reset).map(drop)
    }

    fn reboot(&self, vm: VmId, mode: ShutdownMode) -> Result<()> {
        let flags = match mode {
            ShutdownMode::Agent if self.is_test() => {
                return Err(HypervisorError::unsupported("the guest agent"));
            }
            ShutdownMode::Acpi if self.is_test() => sys::VIR_DOMAIN_REBOOT_DEFAULT,
            ShutdownMode::Agent => sys::VIR_DOMAIN_REBOOT_GUEST_AGENT,
            ShutdownMode::Acpi => sys::VIR_DOMAIN_REBOOT_ACPI_POWER_BTN,
        };
        self.on_active(vm, "reboot", |domain| domain.reboot(flags))
            .or_else(already_going_down)
            .map_err(agent_missing(mode))
    }

    fn pause(&self, vm: VmId) -> Result<()> {
        let domain = self.find(vm)?;
        // libvirt accepts this silently for a paused domain; the trait promises InvalidState
        self.refuse_unless(vm, &domain, "pause", sys::VIR_DOMAIN_RUNNING)?;
        domain.suspend().map(drop).map_err(|e| failed(&format!("pause domain {vm}"), e))
    }

    fn resume(&self, vm: VmId) -> Result<()> {
        let domain = self.find(vm)?;
        let context = format!("resume domain {vm}");
        let (state, _) = domain.get_state().map_err(|e| failed(&context, e))?;
        if state == sys::VIR_DOMAIN_PMSUSPENDED {
            // asleep by its own wish (ACPI S3)
            return domain.pm_wakeup(0).map(drop).map_err(|e| failed(&context, e));
        }
        // the mock has no typed error for this
        self.refuse_unless(vm, &domain, "resume", sys::VIR_DOMAIN_PAUSED)?;
        domain.resume().map(drop).map_err(|e| failed(&context, e))
    }

    fn suspend(&self, vm: VmId) -> Result<()> {
        self.on_active(vm, "suspend to disk", |domain| domain.managed_save(0)).map(drop)
    }

    fn discard_saved(&self, vm: VmId) -> Result<()> {
        let domain = self.find(vm)?;
        let context = format!("discard saved memory of domain {vm}");
        if !domain.has_managed_save(0).map_err(|e| failed(&context, e))? {
            return Err(HypervisorError::new(HypervisorErrorKind::InvalidState, format!("{context}: there is none")));
        }
        domain.managed_save_remove(0).map(drop).map_err(|e| failed(&context, e))
    }

    fn guest_ping(&self, vm: VmId, timeout: Duration) -> Result<bool> {
        let answer = self.with_agent(vm, |command| command(&json!({ "execute": "guest-ping" }), timeout));
        match answer {
            Ok(_) => Ok(true),
            Err(e) if matches!(e.kind(), HypervisorErrorKind::AgentUnavailable | HypervisorErrorKind::Unknown) => {
                Ok(false)
            }
            Err(e) => Err(e),
        }
    }

    fn guest_exec(&self, vm: VmId, request: &ExecRequest) -> Result<ExecResult> {
        self.with_agent(vm, |command| guest::exec(command, request))
    }

    fn guest_write_file(&self, vm: VmId, path: &str, content: &[u8]) -> Result<()> {
        self.with_agent(vm, |command| guest::write_file(command, path, content))
    }

    fn guest_read_file(&self, vm: VmId, path: &str, limit: usize) -> Result<Vec<u8>> {
        self.with_agent(vm, |command| guest::read_file(command, path, limit))
    }

    fn fs_freeze(&self, vm: VmId) -> Result<u32> {
        self.with_agent(vm, |command| guest::count(command, "guest-fsfreeze-freeze"))
    }

    fn fs_thaw(&self, vm: VmId) -> Result<u32> {
        self.with_agent(vm, |command| guest::count(command, "guest-fsfreeze-thaw"))
    }

    fn screenshot(&self, vm: VmId) -> Result<Screenshot> {
        let domain = self.find(vm)?;
        let context = format!("take a screenshot of domain {vm}");
        let fail = |e| failed(&context, e);
        let stream = Stream::new(&self.connection, 0).map_err(fail)?;
        let mime = domain.screenshot(&stream, 0, 0).map_err(fail)?;
        let mut bytes = Vec::new();
        let mut buffer = vec![0; 256 << 10];
        loop {
            let count = stream.recv(&mut buffer).map_err(fail)?;
            if count == 0 {
                break;
            }
            bytes.extend_from_slice(&buffer[..count]);
            if bytes.len() > SCREENSHOT_LIMIT {
                return Err(HypervisorError::new(HypervisorErrorKind::Other, format!("{context}: too large")));
            }
        }
        stream.finish().map_err(fail)?;
        Ok(Screenshot { mime, bytes })
    }

    fn stats(&self, vm: VmId) -> Result<DomainStats> {
        let domain = self.find(vm)?;
        if self.is_test() {
            return self.info_stats(vm, &domain);
        }
        let records = self.statistics(Some(&domain))?;
        records.first().map(stats_from).ok_or_else(|| HypervisorError::not_found(vm))
    }

    fn all_stats(&self) -> Result<Vec<DomainStats>> {
        self.connected()?;
        let flags = sys::VIR_CONNECT_LIST_DOMAINS_ACTIVE;
        let domains = self.connection.list_all_domains(flags).map_err(|e| failed("list domains", e))?;
        let mut ours = HashMap::with_capacity(domains.len());
        for domain in domains {
            let vm = VmId::from_uuid(domain.get_uuid().map_err(|e| failed("list domains", e))?);
            if self.is_ours(vm, &domain)? {
                ours.insert(vm, domain);
            }
        }
        if self.is_test() {
            return ours.iter().map(|(vm, domain)| self.info_stats(*vm, domain)).collect();
        }
        Ok(self.statistics(None)?.iter().map(stats_from).filter(|row| ours.contains_key(&row.vm)).collect())
    }

    fn events(&self) -> Receiver<HypervisorEvent> {
        self.subscribers.subscribe()
    }
}

impl Libvirt {
    fn refuse_unless(&self, vm: VmId, domain: &Domain, what: &str, wanted: u32) -> Result<()> {
        let context = || format!("{what} domain {vm}");
        let (state, _) = domain.get_state().map_err(|e| failed(&context(), e))?;
        if state == wanted {
            return Ok(());
        }
        let text = format!("{}: its state is {:?}", context(), state_of(state, 0, false).0);
        Err(HypervisorError::new(HypervisorErrorKind::InvalidState, text))
    }
}

/// The guest agent waits for the command that stops the guest; when the stop is quicker, it finds that command killed and
/// says so. The guest goes down all the same, and whoever asked waits for the state.
fn already_going_down(error: HypervisorError) -> Result<()> {
    let text = Chain(&error).to_string();
    if text.contains("'guest-shutdown'") && text.contains("terminated abnormally") { Ok(()) } else { Err(error) }
}

/// A domain without an agent channel refuses agent calls as unsupported: to the caller that is a missing agent.
fn agent_missing(mode: ShutdownMode) -> impl Fn(HypervisorError) -> HypervisorError {
    move |e| match (mode, e.kind()) {
        (ShutdownMode::Agent, HypervisorErrorKind::Unsupported) => {
            let context = e.context().to_owned();
            HypervisorError::with_source(HypervisorErrorKind::AgentUnavailable, context, e)
        }
        _ => e,
    }
}

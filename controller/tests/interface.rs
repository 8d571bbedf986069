//! The REST interface: groups, images, templates, VMs, bad input, who may ask.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod fake;

use std::{os::unix::fs::PermissionsExt, sync::Arc};

use fake::{Fleet, Mood, client, command, config, ended, wait_for};
use muster_api::{
    ChangeGroup, ChangeLimits, ChangeTemplate, CommitImage, CreateGroup, CreateTemplate, CreateVms, DiskLimits,
    ExportFormat, Extents, GroupMembers, ImageFormat, ImportByPath, ImportQuery, Job, JobState, ListQuery, NetworkMode,
    PullImage, Upload, Verb, VmStanding, WhenFull,
};
use muster_bus::twin::{LossConfig, Network};
use muster_common::{ByteLen, ErrorCode, SystemClock};
use muster_controller::{Controller, StartError};

fn members(vms: &[&str], groups: &[&str]) -> GroupMembers {
    let texts = |texts: &[&str]| texts.iter().map(|t| t.to_string()).collect();
    GroupMembers { hosts: Vec::new(), vms: texts(vms), groups: texts(groups) }
}

#[tokio::test(flavor = "multi_thread")]
async fn groups_are_nested_and_cycles_and_lost_updates_are_refused() {
    let fleet = Fleet::start(1).await;
    let c = &fleet.client;
    let create = |path: &str| CreateGroup { path: path.into(), members: GroupMembers::default() };
    c.create_group(&create("school/lab1")).await.unwrap();
    c.create_group(&create("staff")).await.unwrap();
    let school = c.group("school").await.unwrap();
    assert_eq!(school.groups, ["school/lab1"], "parents are made");
    assert_eq!(c.create_group(&create("staff")).await.unwrap_err().code(), ErrorCode::AlreadyExists);
    assert_eq!(c.create_group(&create("a//b")).await.unwrap_err().code(), ErrorCode::InvalidArgument);

    let add = |groups: &[&str]| ChangeGroup { add: members(&[], groups), remove: GroupMembers::default() };
    c.change_group("school/lab1", &add(&["staff"]), None).await.unwrap();
    let cycle = c.change_group("staff", &add(&["school"]), None).await.unwrap_err();
    assert_eq!(cycle.code(), ErrorCode::GroupCycle);
    assert!(cycle.to_string().contains("school > school/lab1 > staff"), "{cycle}");

    let hosts = ChangeGroup {
        add: GroupMembers { hosts: vec!["host1".into()], ..Default::default() },
        remove: GroupMembers::default(),
    };
    let changed = c.change_group("school", &hosts, Some(school.version)).await.unwrap();
    assert_eq!((changed.hosts[0].name.as_str(), changed.total_hosts), ("host1", 1));
    let lost = c.change_group("school", &hosts, Some(school.version)).await.unwrap_err();
    assert_eq!(lost.code(), ErrorCode::Conflict);
    assert_eq!(lost.problem().unwrap().status, 412);

    let unknown = c.group("school/lab2").await.unwrap_err();
    assert_eq!(unknown.code(), ErrorCode::NotFound);
    assert!(unknown.problem().unwrap().near.contains(&"school/lab1".to_string()));
    assert_eq!(c.host("host9").await.unwrap_err().problem().unwrap().near, ["host1"]);
    let nobody = c.create_command(&command(Verb::Drain, &["staff"], 5), None).await.unwrap_err();
    assert_eq!(nobody.code(), ErrorCode::InvalidArgument);

    // the fleet is told of the whole set, and a restart keeps it
    let epoch = c.status().await.unwrap().group_epoch;
    let mut sets = fleet.network.join("watcher").subscriber::<muster_idl::v1::GroupSet>(4).unwrap();
    c.delete_group("school", None).await.unwrap();
    wait_for("the group set", async || {
        sets.try_recv().and_then(|s| s.value()).is_some_and(|set| set.epoch > epoch && set.groups.len() == 1)
    })
    .await;
    let Fleet { controller, network, dir, .. } = fleet;
    controller.shutdown().await;
    let controller = fake::start_controller(&network, dir.path()).await;
    let groups = client(&controller).groups(&ListQuery::default()).await.unwrap();
    assert_eq!(groups.items.iter().map(|g| g.path.as_str()).collect::<Vec<_>>(), ["staff"]);
    controller.shutdown().await;
}

fn import(name: &str, path: &std::path::Path) -> ImportByPath {
    ImportByPath { name: name.into(), path: path.display().to_string(), ..Default::default() }
}

async fn follow(fleet: &Fleet, job: Job) -> Job {
    fleet.client.follow_job(&job.id, |_| ()).await.unwrap()
}

fn code(job: &Job) -> &str {
    job.problem.as_ref().map_or("ok", |problem| problem.code.as_str())
}

#[tokio::test(flavor = "multi_thread")]
async fn images_are_imported_pulled_and_deleted() {
    let fleet = Fleet::start(1).await;
    fleet.template().await;
    let c = &fleet.client;
    let image = c.image("debian").await.unwrap();
    assert_eq!((image.revision, image.logical_bytes, image.resident_estimate_bytes), (1, 1 << 20, 8192));
    assert_eq!(c.image("debian@1").await.unwrap(), image);
    assert_eq!(c.image(&image.digest.to_string()).await.unwrap(), image);
    assert_eq!(c.image("debain").await.unwrap_err().problem().unwrap().near, ["debian"]);

    // the bulk endpoint gives the same bytes, also when the source is gone
    std::fs::remove_file(fleet.dir.path().join("disk.raw")).unwrap();
    let base = format!("{}/bulk/v1", fleet.controller.stream_endpoint());
    let http = reqwest::Client::new();
    let bytes = http.get(format!("{base}/manifests/{}", image.digest)).send().await.unwrap().bytes().await.unwrap();
    assert_eq!(blake3::hash(&bytes).as_bytes(), image.digest.as_bytes());
    let missing = http.post(format!("{base}/chunks")).body(vec![7u8; 32]).send().await.unwrap();
    assert_eq!(missing.status(), 404);
    let odd = http.post(format!("{base}/chunks")).body(vec![7u8; 33]).send().await.unwrap();
    assert_eq!(odd.status(), 400);

    // the same content under another name, another content under the same name
    let mut other = vec![0u8; 1 << 20];
    other[..8].copy_from_slice(b"a system");
    other[500_000] = 7;
    let query = ImportQuery { name: "copy".into(), ..Default::default() };
    let job = follow(&fleet, c.import_image(&query, Upload::bytes(other.clone())).await.unwrap()).await;
    assert_eq!((job.state, code(&job)), (JobState::Failed, "already-exists"));
    other[9] = 1;
    let query = ImportQuery { name: "debian".into(), ..Default::default() };
    let taken = c.import_image(&query, Upload::bytes(other.clone())).await.unwrap_err();
    assert_eq!(taken.code(), ErrorCode::AlreadyExists);
    let kernel = c.put_blob(Upload::bytes(b"a kernel".to_vec())).await.unwrap();
    let query =
        ImportQuery { new_revision: true, kernel: Some(kernel.digest), cmdline: Some("console=ttyS0".into()), ..query };
    let job = follow(&fleet, c.import_image(&query, Upload::bytes(other)).await.unwrap()).await;
    assert_eq!(code(&job), "ok");
    let second = c.image("debian").await.unwrap();
    assert_eq!((second.revision, second.boot.kernel), (2, Some(kernel.digest)));
    assert_eq!(second.new_bytes, 65536, "one chunk differs");
    let blob = http.get(format!("{base}/blobs/{}", kernel.digest)).send().await.unwrap().bytes().await.unwrap();
    assert_eq!(&blob[..], b"a kernel");
    assert_eq!(std::fs::read_dir(fleet.dir.path().join("state/incoming")).unwrap().count(), 0, "uploads are removed");

    // what a host says of its store's memory
    let heard = async || c.store("host1").await.unwrap().health.is_some();
    wait_for("the store's health", heard).await;
    let health = c.store("host1").await.unwrap().health.unwrap();
    assert_eq!((health.blocks_damaged, health.blocks_repaired, health.blocks_unreadable), (3, 2, 1));
    assert_eq!((health.nodes.len(), health.nodes[0].node), (1, 1));

    // a store that cannot hold it
    let pull = PullImage { target: vec!["host1".into()], timeout_seconds: Some(5) };
    fleet.agents[0].set_budget(4096);
    wait_for("the small budget", async || c.store("host1").await.unwrap().budget_bytes == 4096).await;
    let large = c.pull_image("debian@2", &pull, None).await.unwrap_err();
    assert_eq!(large.code(), ErrorCode::NoSpace);
    assert!(large.to_string().contains("budget of 4 KiB"), "{large}");
    assert_eq!(c.estimate_image("debian@2").await.unwrap().too_large_for, ["host1"]);
    fleet.agents[0].set_budget(1 << 30);
    wait_for("the usual budget", async || c.store("host1").await.unwrap().budget_bytes == 1 << 30).await;
    let pulled = c.pull_image("debian@2", &pull, None).await.unwrap();
    assert_eq!(pulled.arguments["digest"], second.digest.to_string());
    ended(c, &pulled.summary.id.to_string()).await;

    assert_eq!(c.delete_image("debian@1").await.unwrap_err().code(), ErrorCode::InUse);
    c.delete_image("debian@2").await.unwrap();
    assert_eq!(c.image("debian").await.unwrap().revision, 1);
    c.delete_template("desk", None).await.unwrap();
    c.delete_image("debian").await.unwrap();
    wait_for("the bytes to be gone", async || {
        http.get(format!("{base}/manifests/{}", image.digest)).send().await.unwrap().status() == 404
    })
    .await;
    fleet.controller.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_images_are_refused_by_name_of_what_is_wrong() {
    let fleet = Fleet::start(1).await;
    let dir = fleet.dir.path();
    let mut qcow2 = vec![0u8; 65536];
    qcow2[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
    // a backing file: offset 65000, 9 bytes long
    qcow2[8..16].copy_from_slice(&65000u64.to_be_bytes());
    qcow2[16..20].copy_from_slice(&9u32.to_be_bytes());
    qcow2[65000..65009].copy_from_slice(b"/etc/hide");
    let cases: [(&str, Vec<u8>, &[&str]); 4] = [
        ("backed", qcow2, &["external-reference", "corrupt"]),
        ("empty", Vec::new(), &["corrupt"]),
        ("odd", vec![1; 1000], &["corrupt"]),
        ("packed", b"\x1f\x8b\x08 this is gzip".repeat(64), &["unsupported-format"]),
    ];
    for (name, bytes, codes) in cases {
        let path = dir.join(name);
        std::fs::write(&path, bytes).unwrap();
        let job = fleet.client.import_image_by_path(&import(name, &path)).await.unwrap();
        let job = follow(&fleet, job).await;
        assert!(codes.contains(&code(&job)), "{name}: {:?}", job.problem);
    }
    let missing = fleet.client.import_image_by_path(&import("gone", &dir.join("gone"))).await.unwrap();
    assert_eq!(code(&follow(&fleet, missing).await), "not-found");
    let relative = fleet.client.import_image_by_path(&import("x", std::path::Path::new("x.raw"))).await;
    assert_eq!(relative.unwrap_err().code(), ErrorCode::InvalidArgument);
    assert!(fleet.client.all_images().await.unwrap().is_empty());

    let path = dir.join("hole.raw");
    let file = std::fs::File::create(&path).unwrap();
    file.set_len(8 << 20).unwrap();
    drop(file);
    let estimate = fleet
        .client
        .estimate_file(&muster_api::EstimateRequest { path: path.display().to_string(), ..Default::default() })
        .await
        .unwrap();
    assert_eq!((estimate.logical_bytes, estimate.resident_bytes), (8 << 20, 0), "zeros take nothing");
    fleet.controller.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn vms_are_made_where_there_is_room_and_refused_ones_leave_nothing() {
    let mut fleet = Fleet::start(2).await;
    fleet.template().await;
    let c = fleet.client.clone();
    let create = |names: &[&str]| CreateVms {
        template: "desk".into(),
        names: names.iter().map(|n| n.to_string()).collect(),
        ..Default::default()
    };
    let error = async |create: CreateVms| c.create_vms(&create, None).await.unwrap_err().code();
    assert_eq!(error(CreateVms { template: "dsk".into(), ..create(&["a"]) }).await, ErrorCode::NotFound);
    assert_eq!(error(create(&[])).await, ErrorCode::InvalidArgument);
    assert_eq!(error(create(&["a", "a"])).await, ErrorCode::AlreadyExists);
    assert_eq!(error(create(&["-a"])).await, ErrorCode::InvalidArgument);
    assert_eq!(error(CreateVms { hosts: vec!["host7".into()], ..create(&["a"]) }).await, ErrorCode::NotFound);
    assert_eq!(error(CreateVms { count: Some(500), names: vec![], ..create(&[]) }).await, ErrorCode::NoSpace);
    assert!(c.all_vms(&[]).await.unwrap().is_empty(), "a refused request leaves nothing");

    let made = c.create_vms(&create(&["a", "b"]), None).await.unwrap();
    assert_ne!(made.vms[0].host, made.vms[1].host, "evenly");
    ended(&c, &made.command.to_string()).await;
    assert_eq!(error(create(&["a"])).await, ErrorCode::AlreadyExists);
    let more = CreateVms { count: Some(2), pattern: Some("{host}-x{n}".into()), ..create(&[]) };
    let more = c.create_vms(&more, None).await.unwrap();
    let mut names: Vec<&str> = more.vms.iter().map(|vm| vm.name.as_str()).collect();
    names.sort_unstable();
    assert_eq!(names, ["host1-x01", "host2-x01"]);
    ended(&c, &more.command.to_string()).await;
    assert_eq!(c.delete_template("desk", None).await.unwrap_err().code(), ErrorCode::InUse);

    // refused by its host: wanted no more, and out of its groups
    for agent in &fleet.agents {
        agent.set_mood(Mood::Refuses);
    }
    let refused = CreateVms { groups: vec!["lab".into()], ..create(&["c"]) };
    let refused = c.create_vms(&refused, None).await.unwrap();
    ended(&c, &refused.command.to_string()).await;
    assert_eq!(c.vm("c").await.unwrap_err().code(), ErrorCode::NotFound);
    assert_eq!(c.group("lab").await.unwrap().total_vms, 0);
    for agent in &fleet.agents {
        agent.set_mood(Mood::Obeys);
    }

    // its word is missing: doubtful, until the host speaks of it or it is deleted
    let deleted = c.delete_vm("a").await.unwrap();
    ended(&c, &deleted.summary.id.to_string()).await;
    wait_for("the VM to be gone", async || c.vm("a").await.is_err()).await;
    for agent in &fleet.agents {
        agent.set_mood(Mood::Mute);
    }
    let doubtful = CreateVms { timeout_seconds: Some(1), ..create(&["d"]) };
    let doubtful = c.create_vms(&doubtful, None).await.unwrap();
    assert_eq!(c.vm("d").await.unwrap().standing, VmStanding::Creating);
    ended(&c, &doubtful.command.to_string()).await;
    assert_eq!(c.vm("d").await.unwrap().standing, VmStanding::Doubtful);

    // backups are what verdicts tell of
    for agent in &fleet.agents {
        agent.set_mood(Mood::Obeys);
    }
    let backup = c.create_command(&command(Verb::Backup, &["b"], 5), None).await.unwrap();
    ended(&c, &backup.summary.id.to_string()).await;
    let backups = c.all_backups(&["b".into()]).await.unwrap();
    assert_eq!((backups.len(), backups[0].vm_name.as_str()), (1, "b"));
    assert!(c.all_volumes(&["b".into()]).await.unwrap().iter().all(|v| v.image_name == "debian@1"));

    let on_dead = fleet.agents[0].name.clone();
    fleet.agents[0].kill();
    wait_for("the host to be offline", async || {
        c.host(&on_dead).await.unwrap().state == muster_api::HostState::Offline
    })
    .await;
    let dead = CreateVms { hosts: vec![on_dead], ..create(&["e"]) };
    assert_eq!(error(dead).await, ErrorCode::HostOffline);
    let top = c.top().await.unwrap();
    assert_eq!((top.hosts.len(), top.status.lab), (2, true));
    assert!(c.doctor().await.unwrap().checks.iter().any(|check| check.name == "host host1"));
    let events = c.events(&Default::default()).await.unwrap().items;
    let kinds: Vec<&str> = events.iter().map(|event| event.kind.as_str()).collect();
    for kind in ["controller-started", "host-online", "agent-started", "command-ended", "host-offline"] {
        assert!(kinds.contains(&kind), "{kind} in {kinds:?}");
    }
    fleet.controller.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_of_a_template_reach_the_agent_and_a_resize_that_was_done_is_what_is_shown() {
    let fleet = Fleet::start(1).await;
    fleet.template().await;
    let c = &fleet.client;
    let create = CreateTemplate {
        name: "limited".into(),
        image: "debian".into(),
        vcpus: 1,
        memory: ByteLen::mib(64),
        data_volume: None,
        applications: Vec::new(),
        boot: None,
        network: NetworkMode::None,
        system_limits: DiskLimits { quota: Some(ByteLen::mib(4)), when_full: WhenFull::Spill, ..Default::default() },
        data_limits: DiskLimits::default(),
        tenant: Some("school-a".into()),
    };
    let template = c.create_template(&create).await.unwrap();
    assert_eq!((&template.system_limits, template.tenant.as_deref()), (&create.system_limits, Some("school-a")));
    let mut heard = fleet.network.join("watcher").subscriber::<muster_idl::v1::GroupCommand>(16).unwrap();
    let made = CreateVms { template: "limited".into(), names: vec!["a".into()], ..Default::default() };
    let order = c.create_vms(&made, None).await.unwrap();
    ended(c, &order.command.to_string()).await;
    let sent = std::iter::from_fn(|| heard.try_recv()).filter_map(|sample| sample.value()).next().unwrap();
    let spec: muster_idl::arguments::TemplateSpec = serde_json::from_str(&sent.arguments[0].value).unwrap();
    assert_eq!(spec.tenant.as_deref(), Some("school-a"));
    let limits = spec.system_limits.unwrap();
    assert_eq!((limits.quota_bytes, limits.when_full.as_deref()), (Some(4 << 20), Some("spill")));

    let shown = async || {
        let vm = c.vm("a").await.unwrap();
        (vm.disks[0].limits.to_string(), vm.tenant)
    };
    assert_eq!(shown().await, ("at most 4 MiB, spill".into(), Some("school-a".into())));
    let mut resize = command(Verb::Resize, &["a"], 5);
    resize.arguments.insert("disk".into(), "system".into());
    resize.arguments.insert("quota_bytes".into(), (8 << 20).into());
    let order = c.create_command(&resize, None).await.unwrap();
    let done = ended(c, &order.summary.id.to_string()).await;
    assert_eq!(done.members[0].verdict.as_ref().unwrap().outcome, muster_api::Outcome::Done);
    assert_eq!(shown().await.0, "at most 8 MiB, spill");
    fleet.controller.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn arguments_are_checked_before_anything_is_published() {
    let fleet = Fleet::start(1).await;
    let before = fleet.network.published("muster_v1_group_command");
    let text = async |order: muster_api::CreateCommand| {
        let error = fleet.client.create_command(&order, None).await.unwrap_err();
        assert_eq!(error.code(), ErrorCode::InvalidArgument);
        error.to_string()
    };
    let mut pull = command(Verb::ImagePull, &["host1"], 5);
    assert!(text(pull.clone()).await.contains("needs the argument \"digest\""));
    pull.arguments.insert("digest".into(), "abc".into());
    assert!(text(pull).await.contains("64 hexadecimal digits"));
    assert!(text(command(Verb::Create, &["host1"], 5)).await.contains("POST /v1/vms"));
    assert!(text(command(Verb::Drain, &["host1"], 0)).await.contains("timeout"));
    let mut wrong = command(Verb::Drain, &["host1"], 5);
    wrong.target_kind = Some(muster_api::TargetKind::Vm);
    assert!(text(wrong).await.contains("drain is a verb for hosts"));
    let create = CreateTemplate {
        name: "t".into(),
        image: "none".into(),
        vcpus: 1,
        memory: ByteLen(512),
        data_volume: None,
        applications: Vec::new(),
        boot: None,
        network: NetworkMode::None,
        system_limits: Default::default(),
        data_limits: Default::default(),
        tenant: None,
    };
    let refused = async |create: CreateTemplate| {
        let error = fleet.client.create_template(&create).await.unwrap_err();
        assert_eq!(error.code(), ErrorCode::InvalidArgument);
        error.to_string()
    };
    assert!(refused(create.clone()).await.contains("without a unit are bytes"));
    let create = CreateTemplate { memory: ByteLen::mib(64), data_volume: Some(ByteLen::mib(8)), ..create };
    let limits = |quota, reservation| DiskLimits {
        quota: Some(ByteLen::mib(quota)),
        reservation: Some(ByteLen::mib(reservation)),
        when_full: WhenFull::Spill,
    };
    let system = refused(CreateTemplate { system_limits: limits(4, 5), ..create.clone() }).await;
    assert!(system.contains("the system disk: a quota of 4 MiB is below the reservation of 5 MiB"), "{system}");
    let data = refused(CreateTemplate { data_limits: limits(20, 9), ..create.clone() }).await;
    assert!(data.contains("the data disk: a reservation of 9 MiB is more than the disk of 8 MiB"), "{data}");
    let none = CreateTemplate { data_limits: limits(20, 9), data_volume: None, ..create.clone() };
    assert!(refused(none).await.contains("no data volume"));
    assert!(refused(CreateTemplate { tenant: Some("School".into()), ..create }).await.contains("lower-case"));
    assert_eq!(fleet.network.published("muster_v1_group_command"), before);
    fleet.controller.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn only_this_machine_asks_and_lab_mode_is_said_everywhere() {
    let dir = tempfile::tempdir().unwrap();
    let network = Network::new(1, LossConfig::NONE);
    let mut config = config(dir.path());
    config.api.http_port = Some(0);
    let clock = Arc::new(SystemClock);
    let controller = Controller::start_with(config.clone(), clock.clone(), vec![network.join("c")]).await.unwrap();
    let base = format!("http://{}", controller.http().unwrap());
    let http = reqwest::Client::new();
    let answer = http.get(format!("{base}/v1/status")).send().await.unwrap();
    assert_eq!((answer.status().as_u16(), answer.headers()["muster-lab"].to_str().unwrap()), (200, "true"));
    for (name, value) in [("host", "evil.example"), ("origin", "http://evil.example")] {
        let answer = http.get(format!("{base}/v1/status")).header(name, value).send().await.unwrap();
        assert_eq!(answer.status(), 403, "{name}: {value}");
        assert_eq!(answer.headers()["content-type"], "application/problem+json");
        assert_eq!(answer.headers()["muster-lab"], "true");
    }
    // what a page can send without asking first is not taken
    let plain = http.post(format!("{base}/v1/groups")).body("{\"path\":\"x\"}").send().await.unwrap();
    assert_eq!(plain.status(), 400);
    let body = serde_json::json!({"name": "x", "path": "/etc/shadow"});
    let file = http.post(format!("{base}/v1/images/import")).json(&body).send().await.unwrap();
    assert_eq!(file.status(), 403, "files are read for the socket's users only");
    let nowhere: muster_api::Problem = http.get(format!("{base}/v1/nope")).send().await.unwrap().json().await.unwrap();
    assert_eq!(nowhere.code, "not-found");
    let method = http.put(format!("{base}/v1/hosts")).send().await.unwrap();
    assert_eq!(
        (method.status().as_u16(), method.headers()["content-type"].to_str().unwrap()),
        (405, "application/problem+json")
    );
    let limit = http.get(format!("{base}/v1/hosts?limit=0")).send().await.unwrap();
    assert_eq!(limit.status(), 400);
    let document: serde_json::Value = client(&controller).openapi().await.unwrap();
    assert_eq!(document["info"]["title"], "Muster controller");
    let mode = std::fs::metadata(controller.socket()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);

    // a second one: the directory, the port
    let second = Controller::start_with(config.clone(), clock.clone(), vec![network.join("c2")]).await;
    assert!(matches!(second, Err(StartError::Locked { .. })), "{:?}", second.err());
    config.api.http_port = Some(controller.http().unwrap().port());
    config.state_dir = dir.path().join("other");
    let error = Controller::start_with(config.clone(), clock.clone(), vec![]).await.err().unwrap();
    assert_eq!(error.code(), ErrorCode::AddressInUse);
    assert!(error.to_string().contains("api.http_port"), "{error}");
    config.lab = false;
    let error = Controller::start_with(config, clock, vec![]).await.err().unwrap();
    assert!(muster_common::Chain(&error).to_string().contains("set lab = true"));
    controller.shutdown().await;
}

/// All bytes of an export, and the length the answer claims.
async fn exported(fleet: &Fleet, image: &str, format: ExportFormat) -> (Vec<u8>, Option<u64>) {
    let mut download = fleet.client.export_image(image, format).await.unwrap();
    let len = download.len();
    let mut bytes = Vec::new();
    while let Some(piece) = download.next().await.unwrap() {
        bytes.extend_from_slice(&piece);
    }
    (bytes, len)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_comes_out_in_three_forms_and_raw_is_never_taken_for_something_else() {
    let fleet = Fleet::start(1).await;
    let c = &fleet.client;
    // a raw disk that a guest has written a qcow2 header into, naming a file of the host
    let path = fleet.dir.path().join("disk.raw");
    let mut disk = vec![0u8; 3 << 20];
    disk[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
    disk[8..20].copy_from_slice(&[0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 11]);
    disk[512..523].copy_from_slice(b"/etc/shadow");
    disk[2 << 20..(2 << 20) + 70_000].fill(7);
    std::fs::write(&path, &disk).unwrap();
    let sniffed = c.import_image_by_path(&import("disk", &path)).await.unwrap();
    assert_eq!(code(&follow(&fleet, sniffed).await), "external-reference");
    let declared = ImportByPath { format: ImageFormat::Raw, ..import("disk", &path) };
    let job = follow(&fleet, c.import_image_by_path(&declared).await.unwrap()).await;
    assert_eq!(code(&job), "ok");

    let (raw, len) = exported(&fleet, "disk", ExportFormat::Raw).await;
    assert!(raw == disk && len == Some(3 << 20));
    let (extents, _) = exported(&fleet, "disk", ExportFormat::Extents).await;
    assert!(extents.len() < 4 * 65_536, "{} bytes for three chunks", extents.len());
    let mut back = vec![0u8; 3 << 20];
    let mut reader = Extents::default();
    reader
        .feed(&extents, &mut |at, bytes| {
            back[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
            Ok(())
        })
        .unwrap();
    assert_eq!(reader.finish().unwrap(), 3 << 20);
    assert!(back == disk);
    let (qcow2, len) = exported(&fleet, "disk@1", ExportFormat::Qcow2).await;
    assert_eq!(len, Some(qcow2.len() as u64));
    // what came out goes in again, and is the same image
    let again = fleet.dir.path().join("again.qcow2");
    std::fs::write(&again, &qcow2).unwrap();
    let job = follow(&fleet, c.import_image_by_path(&import("again", &again)).await.unwrap()).await;
    assert_eq!(code(&job), "already-exists", "{:?}", job.problem);
    assert!(job.problem.unwrap().detail.contains("as image disk@1"));
    assert_eq!(c.export_image("nothing", ExportFormat::Raw).await.err().unwrap().code(), ErrorCode::NotFound);
    fleet.controller.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_estimate_says_what_a_file_adds_to_images_that_are_there() {
    let fleet = Fleet::start(1).await;
    let c = &fleet.client;
    let block = |n: u32| (0..1024u32).flat_map(move |i| (n * 2048 + i).to_le_bytes());
    let first: Vec<u8> = (1..=64).flat_map(block).collect();
    let path = fleet.dir.path().join("first.raw");
    std::fs::write(&path, &first).unwrap();
    let job = follow(&fleet, c.import_image_by_path(&import("first", &path)).await.unwrap()).await;
    assert_eq!(code(&job), "ok");
    // three chunks are the same, one has a block of its own, and a chunk of new blocks comes behind
    let mut second = first;
    second[65_536 + 8192..65_536 + 8192 + 4096].fill(9);
    second.extend((100..116).flat_map(block));
    let path = fleet.dir.path().join("second.raw");
    std::fs::write(&path, &second).unwrap();
    let ask = |beside: &[&str]| muster_api::EstimateRequest {
        path: path.display().to_string(),
        beside: beside.iter().map(|b| b.to_string()).collect(),
        ..Default::default()
    };
    let rough = c.estimate_file(&ask(&[])).await.unwrap();
    assert_eq!((rough.logical_bytes, rough.resident_bytes), (80 * 4096, 80 * 4096));
    assert_eq!((rough.added_bytes, rough.new_bytes), (Some(32 * 4096), Some(2 * 65_536)), "by whole chunks");
    let exact = c.estimate_file(&ask(&["first"])).await.unwrap();
    assert_eq!((exact.added_bytes, exact.new_bytes), (Some(17 * 4096), Some(2 * 65_536)));
    assert_eq!(exact.beside, ["first@1"]);
    assert_eq!(c.estimate_file(&ask(&["frist"])).await.unwrap_err().code(), ErrorCode::NotFound);
    fleet.controller.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn templates_take_applications_and_move_to_other_images() {
    let fleet = Fleet::start(1).await;
    fleet.template().await;
    let c = &fleet.client;
    for (name, byte) in [("tools", 1u8), ("games", 2)] {
        let path = fleet.dir.path().join(name);
        std::fs::write(&path, vec![byte; 1 << 20]).unwrap();
        let job = follow(&fleet, c.import_image_by_path(&import(name, &path)).await.unwrap()).await;
        assert_eq!(code(&job), "ok");
    }
    let query = ImportQuery { name: "debian".into(), new_revision: true, ..Default::default() };
    let job = follow(&fleet, c.import_image(&query, Upload::bytes(vec![3; 1 << 20])).await.unwrap()).await;
    assert_eq!(code(&job), "ok");

    let texts = |texts: &[&str]| Some(texts.iter().map(|t| t.to_string()).collect::<Vec<_>>());
    let change = |image: Option<&str>, applications: Option<Vec<String>>| ChangeTemplate {
        image: image.map(str::to_string),
        applications,
        ..Default::default()
    };
    let before = c.template("desk").await.unwrap();
    let with =
        c.change_template("desk", &change(None, texts(&["tools", "games"])), Some(before.version)).await.unwrap();
    let names: Vec<&str> = with.applications.iter().map(|a| a.image_name.as_str()).collect();
    assert_eq!((names, with.image), (vec!["tools@1", "games@1"], before.image));
    let stale = c.change_template("desk", &change(Some("debian"), None), Some(before.version)).await.unwrap_err();
    assert_eq!(stale.code(), ErrorCode::Conflict);
    for (applications, expected) in [
        (texts(&["tools", "tools@1"]), "named twice"),
        (texts(&["nothing"]), "nothing"),
        (Some((0..25).map(|n| format!("x{n}")).collect()), "a VM takes 24"),
    ] {
        let refused = c.change_template("desk", &change(None, applications), None).await.unwrap_err();
        assert!(refused.to_string().contains(expected), "{refused}");
    }

    let create = CreateVms { template: "desk".into(), names: vec!["a".into()], ..Default::default() };
    let made = c.create_vms(&create, None).await.unwrap();
    let command = ended(c, &made.command.to_string()).await;
    let spec: serde_json::Value = serde_json::from_str(&command.arguments["template"]).unwrap();
    assert_eq!(spec["applications"][1]["image_name"], "games@1");

    // the VM stays as it is made; the template goes on
    let moved = c.change_template("desk", &change(Some("debian"), texts(&[])), None).await.unwrap();
    assert_eq!((moved.image_name.as_str(), moved.applications.len()), ("debian@2", 0));
    let tools = c.image("tools").await.unwrap();
    assert_eq!((tools.vms, tools.templates.len()), (1, 0));
    let old = c.image("debian@1").await.unwrap();
    assert_eq!((old.vms, old.templates.len()), (1, 0));
    assert_eq!(c.image("debian@2").await.unwrap().templates, ["desk"]);
    for image in ["tools", "debian@1"] {
        let refused = c.delete_image(image).await.unwrap_err();
        assert_eq!(refused.code(), ErrorCode::InUse);
        assert!(refused.to_string().contains("is used by VM a"), "{refused}");
    }
    let refused = c.delete_image("debian@2").await.unwrap_err();
    assert!(refused.to_string().contains("is used by template desk"), "{refused}");
    let deleted = c.delete_vm("a").await.unwrap();
    ended(c, &deleted.summary.id.to_string()).await;
    wait_for("the VM to be gone", async || c.vm("a").await.is_err()).await;
    for image in ["tools", "games", "debian@1"] {
        c.delete_image(image).await.unwrap();
    }

    // what stands is there after a restart
    let Fleet { controller, network, dir, .. } = fleet;
    controller.shutdown().await;
    let controller = fake::start_controller(&network, dir.path()).await;
    let there = client(&controller).template("desk").await.unwrap();
    assert_eq!((there.image, there.version, there.applications.len()), (moved.image, moved.version, 0));
    controller.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_of_a_template_change_for_vms_made_from_then_on() {
    let fleet = Fleet::start(1).await;
    fleet.template().await;
    let c = &fleet.client;
    let make = async |name: &str| {
        let create = CreateVms { template: "desk".into(), names: vec![name.into()], ..Default::default() };
        ended(c, &c.create_vms(&create, None).await.unwrap().command.to_string()).await;
    };
    make("before").await;
    let mib = |mib| Some(ByteLen::mib(mib));
    let system = |limits: ChangeLimits| ChangeTemplate { system_limits: Some(limits), ..Default::default() };
    let change = async |change: ChangeTemplate| c.change_template("desk", &change, None).await;
    let all = ChangeLimits { quota: mib(4), reservation: mib(1), when_full: Some(WhenFull::Spill) };
    let template = change(system(all)).await.unwrap();
    assert_eq!(
        (template.system_limits.to_string().as_str(), template.vms),
        ("at most 4 MiB, 1 MiB reserved, spill", 1)
    );
    make("after").await;

    // what is not said stays; 0 is none
    let some = ChangeLimits { reservation: Some(ByteLen::ZERO), ..Default::default() };
    let template = change(system(some)).await.unwrap();
    assert_eq!(template.system_limits.to_string(), "at most 4 MiB, spill");
    let moved = change(ChangeTemplate { image: Some("debian".into()), ..Default::default() }).await.unwrap();
    assert_eq!(moved.system_limits, template.system_limits);
    let limits = async |vm: &str| c.vm(vm).await.unwrap().disks[0].limits.to_string();
    assert_eq!(limits("before").await, "", "VMs keep what they were made with");
    assert_eq!(limits("after").await, "at most 4 MiB, 1 MiB reserved, spill");

    // a change is refused as a whole
    let refused = async |wrong: ChangeTemplate| {
        let error = change(wrong).await.unwrap_err();
        assert_eq!(error.code(), ErrorCode::InvalidArgument);
        assert_eq!(c.template("desk").await.unwrap().version, moved.version);
        error.to_string()
    };
    let above = ChangeLimits { reservation: mib(5), ..Default::default() };
    let text = refused(system(above.clone())).await;
    assert!(text.contains("the system disk: a quota of 4 MiB is below the reservation of 5 MiB"), "{text}");
    let large = ChangeLimits { quota: Some(ByteLen::ZERO), reservation: mib(1 << 20), ..Default::default() };
    let text = refused(system(large)).await;
    assert!(text.contains("is more than the disk"), "{text}");
    let text = refused(ChangeTemplate { data_limits: Some(above), ..Default::default() }).await;
    assert!(text.contains("no data volume"), "{text}");
    let tenant = ChangeTemplate { tenant: Some("school-b".into()), ..Default::default() };
    let text = refused(tenant).await;
    assert!(text.contains("template desk has no tenant, which cannot be changed: create another"), "{text}");

    let none = ChangeLimits { quota: Some(ByteLen::ZERO), when_full: Some(WhenFull::Pause), ..Default::default() };
    assert!(change(system(none)).await.unwrap().system_limits.is_none());
    fleet.controller.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_cannot_be_is_refused_by_what_is_wrong() {
    let fleet = Fleet::start(1).await;
    fleet.template().await;
    let c = &fleet.client;
    let create = CreateVms { template: "desk".into(), names: vec!["a".into()], ..Default::default() };
    ended(c, &c.create_vms(&create, None).await.unwrap().command.to_string()).await;
    let commit = |vm: &str, name: &str| CommitImage { vm: vm.into(), name: name.into(), ..Default::default() };
    let refused = async |commit: CommitImage| c.commit_image(&commit).await.unwrap_err();
    assert_eq!(refused(commit("b", "new")).await.code(), ErrorCode::NotFound);
    let taken = refused(commit("a", "debian")).await;
    assert_eq!(taken.code(), ErrorCode::AlreadyExists);
    assert!(taken.to_string().contains("--new-revision"), "{taken}");
    assert_eq!(refused(commit("a", "no/name")).await.code(), ErrorCode::InvalidArgument);
    // the host has not said where its stream endpoint is
    assert_eq!(refused(commit("a", "new")).await.code(), ErrorCode::Unavailable);

    // and now it has, at a place where nobody answers
    fleet.agents[0].set_stream_endpoint("http://127.0.0.1:9");
    wait_for("the endpoint", async || !c.host("host1").await.unwrap().stream_endpoint.is_empty()).await;
    fleet.agents[0].set_mood(Mood::Refuses);
    let job = follow(&fleet, c.commit_image(&commit("a", "new")).await.unwrap()).await;
    let problem = job.problem.unwrap();
    assert!(problem.detail.contains("no snapshot was taken"), "{problem:?}");
    fleet.agents[0].set_mood(Mood::Obeys);
    // this agent is an old one: it does not say what its snapshot is of
    let job = follow(&fleet, c.commit_image(&commit("a", "new")).await.unwrap()).await;
    assert_eq!(code(&job), "unsupported");
    assert!(c.image("new").await.is_err());
    fleet.controller.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_image_is_found_by_name_of_place_and_healed_by_its_own_content() {
    let fleet = Fleet::start(1).await;
    fleet.template().await;
    let c = &fleet.client;
    let packs = fleet.dir.path().join("state/repository/packs");
    let pack = std::fs::read_dir(packs).unwrap().next().unwrap().unwrap().path();
    let mut bytes = std::fs::read(&pack).unwrap();
    // within the first chunk: the pack's head has 32 bytes
    bytes[100] ^= 1;
    std::fs::write(&pack, bytes).unwrap();
    let job = follow(&fleet, c.verify_image("debian").await.unwrap()).await;
    assert_eq!((job.state, code(&job)), (JobState::Failed, "corrupt"));
    let detail = job.problem.unwrap().detail;
    assert!(detail.contains("1 of its chunks are bad, the first at offset 0 is damaged"), "{detail}");
    // its first chunk: said before anything is sent
    let error = c.export_image("debian", ExportFormat::Raw).await.err().unwrap();
    assert_eq!(error.code(), ErrorCode::Corrupt, "{error:?}");
    let again = c.import_image_by_path(&import("again", &fleet.dir.path().join("disk.raw"))).await.unwrap();
    assert_eq!(code(&follow(&fleet, again).await), "already-exists");
    let job = follow(&fleet, c.verify_image("debian").await.unwrap()).await;
    assert_eq!(code(&job), "ok", "{:?}", job.problem);
    fleet.controller.shutdown().await;
}

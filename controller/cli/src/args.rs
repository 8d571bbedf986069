//! The command line as types. `muster NOUN VERB [TARGET]`; what each means is in `cmd/`.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use muster_common::ByteLen;

/// Command fleets of virtual desktops that run from memory.
#[derive(Debug, Parser)]
#[command(
    name = "muster",
    version,
    max_term_width = 110,
    infer_subcommands = false,
    after_help = "\
A TARGET is a VM or host name, an id, or a group path such as school/lab1; several may be given.\n\
Exit status: 0 all done, 1 some members failed, 2 could not run."
)]
pub struct Cli {
    /// Where the controller listens: a unix socket path or http://HOST:PORT
    #[arg(
        long,
        global = true,
        env = "MUSTER_CONNECT",
        default_value = "/run/muster/controller.sock",
        value_name = "WHERE"
    )]
    pub connect: String,
    /// How to print results; json is the stable form
    #[arg(long, short = 'o', global = true, env = "MUSTER_OUTPUT", value_enum, default_value_t = Output::Table)]
    pub output: Output,
    #[command(subcommand)]
    pub noun: Noun,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    Table,
    Json,
}

#[derive(Debug, Subcommand)]
pub enum Noun {
    /// Physical hosts
    #[command(subcommand)]
    Host(HostVerb),
    /// Virtual machines
    #[command(subcommand)]
    Vm(VmVerb),
    /// Named sets of hosts, VMs and groups
    #[command(subcommand)]
    Group(GroupVerb),
    /// Disk images in the controller's repository
    #[command(subcommand)]
    Image(ImageVerb),
    /// VM settings around an image
    #[command(subcommand)]
    Template(TemplateVerb),
    /// Volumes on the hosts
    #[command(subcommand)]
    Volume(VolumeVerb),
    /// Backups the hosts hold
    #[command(subcommand)]
    Backup(BackupVerb),
    /// Memory-resident stores
    #[command(subcommand)]
    Store(StoreVerb),
    /// Commands given so far, and their verdicts
    #[command(subcommand)]
    Command(CommandVerb),
    /// The agent on this machine
    #[command(subcommand)]
    Agent(AgentVerb),
    /// Live view of hosts, stores and VMs
    Top(TopArgs),
    /// Event log, oldest first
    Events(EventsArgs),
    /// What the controller is and whether all is well
    Status,
    /// Print a shell completion script
    Completions {
        #[arg(value_enum)]
        shell: clap_complete::Shell,
    },
}

/// Whom a command is for, and how long it may take.
#[derive(Debug, Args)]
pub struct Target {
    /// Names, ids or group paths
    #[arg(required = true, value_name = "TARGET")]
    pub targets: Vec<String>,
    #[command(flatten)]
    pub deadline: Deadline,
}

#[derive(Debug, Args)]
pub struct Deadline {
    /// Seconds until members that have not answered count as offline or unknown
    #[arg(long, default_value_t = 120, value_name = "SECONDS")]
    pub timeout: u64,
    /// Print the command's id and return; `muster command watch ID` follows it
    #[arg(long)]
    pub no_wait: bool,
}

#[derive(Debug, Subcommand)]
pub enum HostVerb {
    /// List hosts: who is seen, and when last
    Ls,
    /// Show one host
    Show { host: String },
    /// Ask hosts for a verdict and nothing else
    Ping(Target),
    /// Take no new work
    Drain(Target),
    /// Take work again
    Undrain(Target),
    /// Back up all volumes of the hosts
    Backup(Target),
}

#[derive(Debug, Subcommand)]
pub enum VmVerb {
    /// List VMs, all or those of the targets
    Ls {
        #[arg(value_name = "TARGET")]
        targets: Vec<String>,
    },
    /// Show one VM
    Show { vm: String },
    /// Create VMs from a template
    Create(CreateArgs),
    /// Delete VMs and their volumes
    Delete(DeleteArgs),
    /// Start; wakes paused and suspended VMs too
    PowerOn(Target),
    /// Go on from pause or suspend
    Resume(Target),
    /// Cut the power
    PowerOff(Target),
    /// Ask the guest to shut down (guest agent, then ACPI)
    Shutdown {
        #[command(flatten)]
        target: Target,
        /// What to do when the guest has not shut down in time
        #[arg(long, value_enum, default_value_t = ShutdownPolicy::Fail)]
        policy: ShutdownPolicy,
    },
    /// Press the reset button
    Reset(Target),
    /// Ask the guest to reboot
    Reboot(Target),
    /// Save memory and stop
    Suspend(Target),
    /// Stop the processors, keep memory
    Pause(Target),
    /// Keep a point in time of all volumes
    Snapshot {
        #[command(flatten)]
        target: Target,
        #[arg(long)]
        name: String,
    },
    /// Back up all volumes to the host's backup directory
    Backup(Target),
    /// Put the volumes back as they were in a backup (the VM must be off)
    Restore {
        #[command(flatten)]
        target: Target,
        /// A backup id, or `latest`
        #[arg(long, default_value = "latest")]
        backup: String,
    },
    /// Make a disk larger, or change its quota
    ///
    /// A running guest on vhost-user disks sees the new size at once, one on NBD disks after its VM was powered off and on.
    /// Partitions and file systems are the guest's to grow.
    #[command(group = clap::ArgGroup::new("wanted").required(true).multiple(true))]
    Resize {
        #[command(flatten)]
        target: Target,
        /// Which of its disks
        #[arg(long, value_enum)]
        disk: ResizeDisk,
        /// What its size is to be, e.g. 20GiB; disks only grow
        #[arg(long, group = "wanted")]
        size: Option<ByteLen>,
        /// The most it may hold of what its guest has written; 0 for no quota
        #[arg(long, value_name = "SIZE", group = "wanted")]
        quota: Option<ByteLen>,
    },
    /// System disk as in the template again; personal data stays
    ResetSession(Target),
    /// Run a program in the guests through the guest agent
    Exec {
        #[command(flatten)]
        target: Target,
        /// Program and arguments
        #[arg(last = true, required = true, value_name = "PROGRAM")]
        argv: Vec<String>,
    },
    /// Write a file in the guests through the guest agent; content from --from or standard input
    WriteFile {
        #[command(flatten)]
        target: Target,
        /// Path in the guest
        #[arg(long)]
        path: String,
        /// Local file with the content; - is standard input
        #[arg(long, default_value = "-", value_name = "FILE")]
        from: PathBuf,
    },
    /// Throw volumes away, to practise a restore
    DestroyVolumes(DeleteArgs),
    /// Serial console; leave with Ctrl-]
    Console { vm: String },
    /// Save a picture of the screen (PNG)
    Screenshot {
        vm: String,
        /// Where to; default VM.png
        #[arg(long, value_name = "FILE")]
        to: Option<PathBuf>,
    },
    /// Offer the VM's screen (VNC) on a local unix socket until interrupted
    Vnc {
        vm: String,
        #[arg(long, value_name = "SOCKET")]
        listen: PathBuf,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ResizeDisk {
    System,
    Data,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum WhenFull {
    /// The VM stands still until there is room
    Pause,
    /// The disk's coldest blocks go to a file on the host's disk
    Spill,
}

/// What the disks of a template's VMs may take of their hosts' memory.
#[derive(Debug, Args)]
#[command(next_help_heading = "Memory of the host")]
pub struct LimitArgs {
    /// The most the system disk may hold of what its guest has written
    #[arg(long, value_name = "SIZE")]
    pub system_quota: Option<ByteLen>,
    /// So much can be written to the system disk whatever other disks do
    #[arg(long, value_name = "SIZE")]
    pub system_reserve: Option<ByteLen>,
    /// What happens to the system disk when memory is full
    #[arg(long, value_enum, default_value_t = WhenFull::Pause)]
    pub system_when_full: WhenFull,
    /// The most the data disk may hold of what its guest has written
    #[arg(long, value_name = "SIZE", requires = "data")]
    pub data_quota: Option<ByteLen>,
    /// So much can be written to the data disk whatever other disks do
    #[arg(long, value_name = "SIZE", requires = "data")]
    pub data_reserve: Option<ByteLen>,
    /// What happens to the data disk when memory is full
    #[arg(long, value_enum, default_value_t = WhenFull::Pause)]
    pub data_when_full: WhenFull,
    /// VMs of one tenant share blocks among themselves only (images are everybody's)
    #[arg(long, value_name = "NAME")]
    pub tenant: Option<String>,
}

/// Limits of disks of VMs made from now on; what is left out stays.
#[derive(Debug, Args)]
#[command(next_help_heading = "Memory of the host")]
pub struct ChangeLimitArgs {
    /// The most the system disk may hold of what its guest has written; 0 for no quota
    #[arg(long, value_name = "SIZE", group = "change")]
    pub system_quota: Option<ByteLen>,
    /// So much can be written to the system disk whatever other disks do; 0 for nothing
    #[arg(long, value_name = "SIZE", group = "change")]
    pub system_reserve: Option<ByteLen>,
    /// What happens to the system disk when memory is full
    #[arg(long, value_enum, group = "change")]
    pub system_when_full: Option<WhenFull>,
    /// The most the data disk may hold of what its guest has written; 0 for no quota
    #[arg(long, value_name = "SIZE", group = "change")]
    pub data_quota: Option<ByteLen>,
    /// So much can be written to the data disk whatever other disks do; 0 for nothing
    #[arg(long, value_name = "SIZE", group = "change")]
    pub data_reserve: Option<ByteLen>,
    /// What happens to the data disk when memory is full
    #[arg(long, value_enum, group = "change")]
    pub data_when_full: Option<WhenFull>,
    /// Cannot be changed: any other than it has is refused
    #[arg(long, value_name = "NAME", group = "change", hide = true)]
    pub tenant: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ShutdownPolicy {
    Fail,
    PowerOff,
}

#[derive(Debug, Args)]
pub struct CreateArgs {
    #[arg(long, short)]
    pub template: String,
    /// Name, or a pattern with {n} for several (default: TEMPLATE-{n})
    #[arg(long)]
    pub name: Option<String>,
    /// How many altogether
    #[arg(long, default_value_t = 1, conflicts_with = "per_host")]
    pub count: u32,
    /// How many on each host
    #[arg(long, value_name = "COUNT")]
    pub per_host: Option<u32>,
    /// Hosts or host groups to choose from (default: all that are seen)
    #[arg(long = "on", value_name = "HOST")]
    pub hosts: Vec<String>,
    /// Group the new VMs become members of; made when it is not there
    #[arg(long)]
    pub group: Option<String>,
    #[command(flatten)]
    pub deadline: Deadline,
}

#[derive(Debug, Args)]
pub struct DeleteArgs {
    #[command(flatten)]
    pub target: Target,
    /// Do not ask
    #[arg(long, short)]
    pub yes: bool,
}

#[derive(Debug, Subcommand)]
pub enum GroupVerb {
    /// List groups
    Ls,
    /// Show a group's members, direct and through its groups
    Show { path: String },
    /// Create a group; missing parents are created too
    Create { path: String },
    /// Delete a group and the groups below its path, not the members
    Delete { path: String },
    /// Add members
    Add(MembersArgs),
    /// Remove members
    Remove(MembersArgs),
}

#[derive(Debug, Args)]
pub struct MembersArgs {
    pub path: String,
    #[arg(long = "host", value_name = "HOST")]
    pub hosts: Vec<String>,
    #[arg(long = "vm", value_name = "VM")]
    pub vms: Vec<String>,
    #[arg(long = "group", value_name = "PATH")]
    pub groups: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ImageFormat {
    Auto,
    Raw,
    Qcow2,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ExportFormat {
    /// Sparse: zeros become holes
    Raw,
    /// Version 3, sparse, not compressed
    Qcow2,
}

#[derive(Debug, Subcommand)]
pub enum ImageVerb {
    /// List images
    Ls,
    /// Show one image
    Show { image: String },
    /// Import a raw or qcow2 file into the repository
    Import {
        file: PathBuf,
        /// Predict what it would take, in memory and on disk, and import nothing
        #[arg(long)]
        estimate: bool,
        /// Default: the file's name without its ending
        #[arg(long)]
        name: Option<String>,
        #[arg(long, value_enum, default_value_t = ImageFormat::Auto)]
        format: ImageFormat,
        /// The name may exist already: this becomes its next revision
        #[arg(long)]
        new_revision: bool,
        /// Kernel for direct boot
        #[arg(long, value_name = "FILE", requires = "cmdline")]
        kernel: Option<PathBuf>,
        /// Initial RAM file system for direct boot
        #[arg(long, value_name = "FILE", requires = "kernel")]
        initrd: Option<PathBuf>,
        /// Kernel command line for direct boot
        #[arg(long, requires = "kernel")]
        cmdline: Option<String>,
    },
    /// Predict the memory a raw or qcow2 file would take
    Estimate {
        file: PathBuf,
        #[arg(long, value_enum, default_value_t = ImageFormat::Auto)]
        format: ImageFormat,
        /// An image that stores will hold as well; it is read too, so that what the file adds to it is exact
        #[arg(long, value_name = "IMAGE")]
        beside: Vec<String>,
    },
    /// Write an image to a file
    Export {
        image: String,
        file: PathBuf,
        #[arg(long, value_enum, default_value_t = ExportFormat::Raw)]
        format: ExportFormat,
        /// Replace the file when it exists
        #[arg(long)]
        force: bool,
    },
    /// Make an image of a VM's system disk as it is now; the VM goes on
    Commit {
        vm: String,
        /// The image's name
        #[arg(long = "as", value_name = "NAME")]
        name: String,
        /// The name may exist already: this becomes its next revision
        #[arg(long)]
        new_revision: bool,
        /// Seconds that the snapshot on the host may take
        #[arg(long, default_value_t = 120, value_name = "SECONDS")]
        timeout: u64,
    },
    /// Make an image resident on hosts
    Pull {
        image: String,
        #[command(flatten)]
        target: Target,
    },
    /// Make hosts forget an image
    Drop {
        image: String,
        #[command(flatten)]
        target: Target,
    },
    /// Read an image back from the repository and check every chunk
    Verify { image: String },
    /// Delete an image from the repository; refused while something is made from it
    #[command(visible_alias = "rm")]
    Delete { image: String },
}

#[derive(Debug, Subcommand)]
pub enum TemplateVerb {
    /// List templates
    Ls,
    /// Show one template
    Show { template: String },
    /// Create a template
    Create {
        name: String,
        #[arg(long)]
        image: String,
        #[arg(long, default_value_t = 1)]
        vcpus: u32,
        /// e.g. 512MiB
        #[arg(long, default_value = "1GiB")]
        memory: ByteLen,
        /// Size of a personal data volume; none when left out
        #[arg(long, value_name = "SIZE")]
        data: Option<ByteLen>,
        /// Image to attach read-only, as disk vdc, vdd and so on; may be given several times
        #[arg(long = "application", value_name = "IMAGE")]
        applications: Vec<String>,
        #[command(flatten)]
        limits: LimitArgs,
    },
    /// Move a template to another image, other applications or other limits; VMs made from it stay as they are
    #[command(
        group = clap::ArgGroup::new("change").required(true).multiple(true),
        override_usage = "muster template change [OPTIONS] <TEMPLATE>"
    )]
    Change {
        template: String,
        #[arg(long, group = "change")]
        image: Option<String>,
        /// All of its applications, those it has already too
        #[arg(long = "application", value_name = "IMAGE", group = "change", conflicts_with = "no_applications")]
        applications: Vec<String>,
        #[arg(long, group = "change")]
        no_applications: bool,
        #[command(flatten)]
        limits: ChangeLimitArgs,
    },
    /// Delete a template; VMs made from it stay
    Delete { template: String },
}

#[derive(Debug, Subcommand)]
pub enum VolumeVerb {
    /// List volumes, all or those of the targets
    Ls {
        #[arg(value_name = "TARGET")]
        targets: Vec<String>,
    },
    /// What the disks of running VMs do: requests, bytes, latencies of the last second, waiting for limits or space
    Top {
        #[arg(value_name = "TARGET")]
        targets: Vec<String>,
    },
}

#[derive(Debug, Subcommand)]
pub enum BackupVerb {
    /// List backups, newest first
    Ls {
        #[arg(value_name = "TARGET")]
        targets: Vec<String>,
    },
}

#[derive(Debug, Subcommand)]
pub enum StoreVerb {
    /// List stores: budget, resident, metadata, ratio
    Ls,
    /// Show one host's store and its images
    Show { host: String },
}

#[derive(Debug, Subcommand)]
pub enum CommandVerb {
    /// List commands, newest first
    Ls {
        #[arg(long, default_value_t = 20)]
        limit: u32,
    },
    /// Show a command and the verdict of every member
    Show { id: String },
    /// Follow a command to its end
    Watch { id: String },
}

#[derive(Debug, Subcommand)]
pub enum AgentVerb {
    /// Stop the agent of this machine; refuses while volumes are attached
    Stop {
        /// The agent's control socket
        #[arg(long, default_value = "/run/muster/a/ctl.sock", value_name = "SOCKET")]
        socket: PathBuf,
        /// Pause the VMs first; their volumes are lost
        #[arg(long)]
        force: bool,
    },
    /// Show what the agent of this machine says of itself
    Status {
        #[arg(long, default_value = "/run/muster/a/ctl.sock", value_name = "SOCKET")]
        socket: PathBuf,
    },
}

#[derive(Debug, Args)]
pub struct TopArgs {
    /// Print once and return
    #[arg(long)]
    pub once: bool,
    /// Seconds between two pictures
    #[arg(long, default_value_t = 1)]
    pub interval: u64,
}

#[derive(Debug, Args)]
pub struct EventsArgs {
    /// Go on as events happen
    #[arg(long, short)]
    pub follow: bool,
    #[arg(long, default_value_t = 50)]
    pub limit: u32,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn help(of: &[&str]) -> String {
        // as wide on every terminal, and whatever is set around the test
        let mut command = Cli::command().term_width(110).mut_args(|arg| arg.hide_env_values(true));
        command.build();
        let command = of.iter().try_fold(&mut command, |c, name| c.find_subcommand_mut(name)).expect("it is a word");
        command.render_help().to_string()
    }

    #[test]
    fn the_help_is_the_known_one() {
        insta::assert_snapshot!("help", help(&[]));
        insta::assert_snapshot!("help_vm", help(&["vm"]));
        insta::assert_snapshot!("help_vm_create", help(&["vm", "create"]));
        insta::assert_snapshot!("help_image", help(&["image"]));
        insta::assert_snapshot!("help_template_create", help(&["template", "create"]));
        insta::assert_snapshot!("help_template_change", help(&["template", "change"]));
        insta::assert_snapshot!("help_vm_resize", help(&["vm", "resize"]));
    }

    #[test]
    fn the_definitions_are_sound() {
        Cli::command().debug_assert();
    }
}

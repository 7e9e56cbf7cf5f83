package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"

	"bauta.dev/bauta/internal/config"
	"bauta.dev/bauta/internal/datapath"
	"bauta.dev/bauta/internal/policy"
)

// backend makes the kernel follow a policy.
type backend interface {
	Apply(context.Context, *policy.Policy) error
	Attached() []datapath.Attachment
	Sweep(context.Context) (datapath.Swept, error)
	Close() error
}

// inspector reads what is in the kernel, whoever put it there.
type inspector interface {
	Counts() ([]datapath.Count, error)
	Exclusions() ([]netip.Prefix, error)
	Attachments() ([]datapath.Attachment, error)
	Usage() ([2]datapath.Usage, error)
	WorstPort() (datapath.PortUse, error)
	Applied() bool
	Tier() string
	Close()
}

// inspectRoot opens the data plane below root; none is fs.ErrNotExist.
func inspectRoot(root string) (inspector, error) {
	return nil, fs.ErrNotExist
}

func openDatapath(opt datapath.Options) (backend, error) {
	return nil, errors.ErrUnsupported
}

const reservedPortsPath = "/proc/sys/net/ipv4/ip_local_reserved_ports"

// reservedPorts reads ip_local_reserved_ports of the calling thread's network
// namespace. A kernel without it reserves none.
func reservedPorts() ([]config.PortRange, error) {
	// A line of 65536 ports is longer than any buffer of one read.
	data, err := os.ReadFile(reservedPortsPath)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	ranges, err := config.ParseReservedPorts(string(data))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", reservedPortsPath, err)
	}
	return ranges, nil
}

// hasIPv6 tells whether the kernel has IPv6: not with ipv6.disable=1 either.
func hasIPv6() bool {
	_, err := os.Stat("/proc/net/if_inet6")
	return !errors.Is(err, fs.ErrNotExist)
}

// memory is the size of the machine's memory; zero if it is not to be had.
func memory() uint64 {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return 0
	}
	return uint64(info.Totalram) * uint64(info.Unit)
}

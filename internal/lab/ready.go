package lab

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// readyTimeout is far more than a busy machine needs.
const readyTimeout = 10 * time.Second

// awaitReady waits until a device can carry traffic. Carrier and IPv6 addresses
// take effect in work queues of the kernel, after the request that set them was
// answered. A packet sent in between is lost, and a lost neighbor solicitation
// costs the first connection a second.
func (ns *NS) awaitReady(dev string) error {
	deadline := time.Now().Add(readyTimeout)
	for {
		missing, err := ns.notReady(dev)
		if err != nil || missing == "" {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("link %s in %s: %s after %s", dev, ns, missing, readyTimeout)
		}
		// There is no event for a joined group, so this has to ask.
		time.Sleep(time.Millisecond)
	}
}

// notReady says what a device still lacks.
func (ns *NS) notReady(dev string) (missing string, err error) {
	err = ns.change(dev, "ask whether it is ready", func(l netlink.Link) error {
		if l.Attrs().RawFlags&(unix.IFF_LOOPBACK|unix.IFF_NOARP) != 0 {
			return nil // no carrier to wait for, and no neighbor discovery
		}
		if state := l.Attrs().OperState; state != netlink.OperUp {
			missing = "operational state " + state.String()
			return nil
		}
		missing, err = notReady6(l)
		return err
	})
	return missing, err
}

// notReady6 runs inside the namespace. Neighbor discovery needs a link-local
// address to ask from, and for each address its group to be asked by.
func notReady6(l netlink.Link) (missing string, err error) {
	dev := l.Attrs().Name
	off, err := os.ReadFile("/proc/sys/net/ipv6/conf/" + dev + "/disable_ipv6")
	if errors.Is(err, fs.ErrNotExist) || err == nil && strings.TrimSpace(string(off)) != "0" {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	groups, err := os.ReadFile("/proc/thread-self/net/igmp6")
	if err != nil {
		return "", err
	}
	addrs, err := netlink.AddrList(l, netlink.FAMILY_V6)
	if errors.Is(err, netlink.ErrDumpInterrupted) {
		return "a list of addresses that did not change while it was read", nil
	}
	if err != nil {
		return "", err
	}
	linkLocal := false
	for _, a := range addrs {
		if a.Flags&unix.IFA_F_TENTATIVE != 0 {
			return fmt.Sprintf("address %s tentative", a.IP), nil
		}
		if !joined(string(groups), dev, a.IP) {
			return fmt.Sprintf("address %s without its multicast group", a.IP), nil
		}
		linkLocal = linkLocal || a.IP.IsLinkLocalUnicast()
	}
	if !linkLocal {
		return "no link-local address", nil
	}
	return "", nil
}

// joined looks for the solicited-node group of an address (RFC 4291, 2.7.1) in
// the kernel's list: index, device, group in hex, and more.
func joined(groups, dev string, ip net.IP) bool {
	group := netip.MustParseAddr("ff02::1:ff00:0").As16()
	copy(group[13:], ip[len(ip)-3:])
	for line := range strings.Lines(groups) {
		f := strings.Fields(line)
		if len(f) > 2 && f[1] == dev && f[2] == fmt.Sprintf("%x", group) {
			return true
		}
	}
	return false
}

package lab

import (
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// LinkOpts are the properties of a veth pair; the zero value is a plain pair
// that is up and has no global addresses.
type LinkOpts struct {
	MTU    int // both ends; 0 = 1500
	AddrsA []netip.Prefix
	AddrsB []netip.Prefix
	// MACB is the link-layer address of the second end; none: another one each time.
	MACB      net.HardwareAddr
	NoOffload bool // both ends: packets on the wire have wire size and final checksums
	// Down leaves both ends down.
	Down bool
}

// Link connects two namespaces by a veth pair and returns when both ends can
// carry traffic of both families.
func Link(a *NS, aName string, b *NS, bName string, o LinkOpts) error {
	veth := netlink.NewVeth(netlink.LinkAttrs{Name: aName, MTU: o.MTU})
	veth.PeerName, veth.PeerHardwareAddr = bName, o.MACB
	err := b.WithFD(func(fd int) error {
		veth.PeerNamespace = netlink.NsFd(fd)
		return a.Do(func() error { return netlink.LinkAdd(veth) })
	})
	if err != nil {
		return fmt.Errorf("create veth %s (%s) to %s (%s): %w", aName, a, bName, b, err)
	}
	err = errors.Join(a.furnish(aName, o, o.AddrsA), b.furnish(bName, o, o.AddrsB))
	if err == nil && !o.Down {
		err = errors.Join(a.awaitReady(aName), b.awaitReady(bName))
	}
	if err != nil {
		return errors.Join(err, a.DeleteLink(aName))
	}
	return nil
}

func (ns *NS) furnish(dev string, o LinkOpts, addrs []netip.Prefix) error {
	// The attributes of NewVeth describe the first end only.
	if o.MTU != 0 {
		if err := ns.SetMTU(dev, o.MTU); err != nil {
			return err
		}
	}
	if o.NoOffload {
		if err := ns.SetOffload(dev, false, AllOffloads...); err != nil {
			return err
		}
	}
	if !o.Down {
		if err := ns.SetUp(dev); err != nil {
			return err
		}
	}
	for _, p := range addrs {
		if err := ns.AddAddr(dev, p); err != nil {
			return err
		}
	}
	return nil
}

// link, like every request here, uses a socket that is opened inside the
// namespace. A long-lived netlink.Handle would be faster, but once closed it
// sends its requests to the namespace of the thread: to the host.
func (ns *NS) link(dev string) (l netlink.Link, err error) {
	err = ns.Do(func() error {
		l, err = netlink.LinkByName(dev)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("link %s in %s: %w", dev, ns, err)
	}
	return l, nil
}

// change applies one of netlink's link functions to a device.
func (ns *NS) change(dev, what string, f func(netlink.Link) error) error {
	l, err := ns.link(dev)
	if err != nil {
		return err
	}
	if err := ns.Do(func() error { return f(l) }); err != nil {
		return fmt.Errorf("link %s in %s: %s: %w", dev, ns, what, err)
	}
	return nil
}

// SetUp sets a device up.
func (ns *NS) SetUp(dev string) error { return ns.change(dev, "set up", netlink.LinkSetUp) }

// SetDown sets a device down; the kernel then forgets its routes and IPv6 addresses.
func (ns *NS) SetDown(dev string) error { return ns.change(dev, "set down", netlink.LinkSetDown) }

// DeleteLink deletes a device, and the other end of a veth pair with it.
func (ns *NS) DeleteLink(dev string) error { return ns.change(dev, "delete", netlink.LinkDel) }

// SetMTU sets the MTU of one end of a link.
func (ns *NS) SetMTU(dev string, mtu int) error {
	return ns.change(dev, "set mtu", func(l netlink.Link) error { return netlink.LinkSetMTU(l, mtu) })
}

// Rename gives a device, which must be down, another name.
func (ns *NS) Rename(dev, name string) error {
	return ns.change(dev, "rename to "+name, func(l netlink.Link) error { return netlink.LinkSetName(l, name) })
}

// Index returns the interface index of a device.
func (ns *NS) Index(dev string) (int, error) {
	l, err := ns.link(dev)
	if err != nil {
		return 0, err
	}
	return l.Attrs().Index, nil
}

// MAC returns the link-layer address of a device.
func (ns *NS) MAC(dev string) (net.HardwareAddr, error) {
	l, err := ns.link(dev)
	if err != nil {
		return nil, err
	}
	return l.Attrs().HardwareAddr, nil
}

// Links returns the names of all devices, by index.
func (ns *NS) Links() ([]string, error) {
	var names []string
	err := ns.Do(func() error {
		links, err := netlink.LinkList()
		for _, l := range links {
			names = append(names, l.Attrs().Name)
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("list links in %s: %w", ns, err)
	}
	return names, nil
}

// AddBridge creates a bridge that is up, and makes the devices its ports.
func (ns *NS) AddBridge(name string, ports ...string) error {
	// Snooping would hold back neighbor discovery until a querier is known.
	snoop := false
	br := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: name}, MulticastSnooping: &snoop}
	// One without an address of its own has the lowest of its ports, and another one
	// when ports come and go: neighbors would not find it for a while.
	br.HardwareAddr = make(net.HardwareAddr, 6)
	rand.Read(br.HardwareAddr)
	br.HardwareAddr[0] = br.HardwareAddr[0]&^1 | 2 // unicast, locally administered
	if err := ns.Do(func() error { return netlink.LinkAdd(br) }); err != nil {
		return fmt.Errorf("create bridge %s in %s: %w", name, ns, err)
	}
	for _, p := range ports {
		if err := ns.AddPort(name, p); err != nil {
			return err
		}
	}
	return ns.SetUp(name)
}

// AddPort makes a device a port of a bridge.
func (ns *NS) AddPort(bridge, dev string) error {
	br, err := ns.link(bridge)
	if err != nil {
		return err
	}
	return ns.change(dev, "join "+bridge, func(l netlink.Link) error { return netlink.LinkSetMaster(l, br) })
}

// AddVXLAN creates a VXLAN tunnel device (UDP port 8472) to one remote, and sets it up.
func (ns *NS) AddVXLAN(name string, id int, local, remote netip.Addr) error {
	vx := &netlink.Vxlan{
		LinkAttrs: netlink.LinkAttrs{Name: name}, VxlanId: id, Port: 8472,
		SrcAddr: local.AsSlice(), Group: remote.AsSlice(), Learning: true,
	}
	if err := ns.Do(func() error { return netlink.LinkAdd(vx) }); err != nil {
		return fmt.Errorf("create vxlan %s in %s: %w", name, ns, err)
	}
	return ns.SetUp(name)
}

// AddTUN creates a device without a link-layer header and sets it up. Each read
// of the file is a packet that left through it, each write one that arrives;
// the device goes away when the file is closed.
func (ns *NS) AddTUN(name string) (*os.File, error) {
	fd := -1
	err := ns.Do(func() (err error) {
		if fd, err = unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0); err != nil {
			return err
		}
		req, err := unix.NewIfreq(name)
		if err != nil {
			return err
		}
		req.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
		return unix.IoctlIfreq(fd, unix.TUNSETIFF, req)
	})
	if err == nil {
		err = ns.SetUp(name)
	}
	if err != nil {
		if fd >= 0 {
			unix.Close(fd)
		}
		return nil, fmt.Errorf("create tun %s in %s: %w", name, ns, err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

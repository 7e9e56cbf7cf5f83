package lab

import (
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Offload is work that a device can be left to do. A veth pair leaves it
// undone: packets arrive as large segments with checksums not filled in.
type Offload uint32

// The values are the ethtool commands that set them.
const (
	TSO        Offload = unix.ETHTOOL_STSO
	GSO        Offload = unix.ETHTOOL_SGSO
	GRO        Offload = unix.ETHTOOL_SGRO
	TxChecksum Offload = unix.ETHTOOL_STXCSUM
	RxChecksum Offload = unix.ETHTOOL_SRXCSUM
)

// AllOffloads is every Offload, in an order in which they can be switched off.
var AllOffloads = []Offload{TSO, GSO, GRO, TxChecksum, RxChecksum}

// SetOffload switches offloads of a device on or off.
func (ns *NS) SetOffload(dev string, on bool, which ...Offload) error {
	if len(dev) >= unix.IFNAMSIZ {
		return fmt.Errorf("offload of %s: name too long", dev)
	}
	return ns.Do(func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("offload of %s: socket: %w", dev, err)
		}
		defer unix.Close(fd)
		for _, w := range which {
			if err := setOffload(fd, dev, w, on); err != nil {
				return fmt.Errorf("offload of %s: ethtool command %#x: %w", dev, uint32(w), err)
			}
		}
		return nil
	})
}

func setOffload(fd int, dev string, w Offload, on bool) error {
	// struct ethtool_value and struct ifreq of the kernel; x/sys keeps the
	// ifreq variant with a pointer to itself.
	value := struct{ cmd, data uint32 }{cmd: uint32(w)}
	if on {
		value.data = 1
	}
	req := struct {
		name [unix.IFNAMSIZ]byte
		data unsafe.Pointer
		_    [16]byte
	}{data: unsafe.Pointer(&value)}
	copy(req.name[:], dev)
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&req)))
	runtime.KeepAlive(&value)
	if errno != 0 {
		return errno
	}
	return nil
}

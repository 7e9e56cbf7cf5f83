package conntrack

import (
	"errors"
	"fmt"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// table is a socket to ctnetlink, for one request after the other.
type table struct {
	sockets map[int]*nl.SocketHandle
}

func open() (*table, error) {
	s, err := nl.Subscribe(unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, fmt.Errorf("conntrack: open netlink socket: %w", err)
	}
	if err := errors.Join(s.SetSendTimeout(&nl.SocketTimeoutTv), s.SetReceiveTimeout(&nl.SocketTimeoutTv)); err != nil {
		s.Close()
		return nil, fmt.Errorf("conntrack: netlink socket: %w", err)
	}
	return &table{map[int]*nl.SocketHandle{unix.NETLINK_NETFILTER: {Socket: s}}}, nil
}

func (t *table) close() {
	for _, s := range t.sockets {
		s.Close()
	}
}

func (t *table) request(operation, flags int, family uint8) *nl.NetlinkRequest {
	const ctnetlink = 1 // NFNL_SUBSYS_CTNETLINK
	req := nl.NewNetlinkRequest(ctnetlink<<8|operation, flags)
	req.Sockets = t.sockets
	req.AddData(&nl.Nfgenmsg{NfgenFamily: family, Version: nl.NFNETLINK_V0})
	return req
}

var errInterrupted = errors.New("the table changed too often while it was read")

// dump calls visit with each connection of both families, until it has enough.
func (t *table) dump(visit func(msg []byte) bool) error {
	req := t.request(nl.IPCTNL_MSG_CT_GET, unix.NLM_F_DUMP, unix.AF_UNSPEC)
	err := req.ExecuteIter(unix.NETLINK_NETFILTER, 0, visit)
	if errors.Is(err, nl.ErrDumpInterrupted) {
		err = errInterrupted
	}
	if err != nil {
		return fmt.Errorf("conntrack: list: %w", err)
	}
	return nil
}

func (t *table) create(f Flow) error {
	if err := errors.Join(f.complete(), f.creatable()); err != nil {
		return err
	}
	// With NLM_F_EXCL a connection that is there is not changed: its translation can't be.
	req := t.request(nl.IPCTNL_MSG_CT_NEW, unix.NLM_F_ACK|unix.NLM_F_CREATE|unix.NLM_F_EXCL, f.family())
	f.encode(req)
	_, err := req.Execute(unix.NETLINK_NETFILTER, 0)
	return err
}

func (t *table) remove(f Flow) (bool, error) {
	if err := f.complete(); err != nil {
		return false, err
	}
	req := t.request(nl.IPCTNL_MSG_CT_DELETE, unix.NLM_F_ACK, f.family())
	f.encodeKey(req)
	_, err := req.Execute(unix.NETLINK_NETFILTER, 0)
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	return err == nil, err
}

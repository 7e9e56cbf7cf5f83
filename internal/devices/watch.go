package devices

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

const (
	// settle is how long changes are collected after the first one. One command
	// (`ip link set eth0 down`) makes a dozen messages within a millisecond.
	settle = 100 * time.Millisecond

	// resubscribe is the pause after a subscription could not be made anew.
	resubscribe = time.Second
)

// Watch calls changed when links, addresses, routes, qdiscs or tc filters of the
// calling thread's network namespace may have changed, and once when the subscription stands: what
// happens after a call is followed by another. It never says what changed; read
// again. When messages were lost, it subscribes anew and calls changed.
// Watch blocks until ctx is done, and then returns nil; it fails only when the
// first subscription does. changed runs on the calling goroutine.
func Watch(ctx context.Context, log *slog.Logger, changed func()) error {
	sub, err := subscribe()
	if err != nil {
		return err
	}
	for {
		changed()
		err := receive(ctx, sub, changed)
		sub.Close()
		if ctx.Err() != nil {
			return nil
		}
		log.Debug("network changes lost, subscribing anew", "error", err)
		for {
			if sub, err = subscribe(); err == nil {
				break
			}
			log.Warn("network changes are not seen, retrying", "error", err, "after", resubscribe)
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(resubscribe):
			}
		}
	}
}

func subscribe() (*nl.NetlinkSocket, error) {
	sub, err := nl.Subscribe(unix.NETLINK_ROUTE, unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR,
		unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE, unix.RTNLGRP_TC)
	if err != nil {
		return nil, fmt.Errorf("subscribe to network changes: %w", err)
	}
	return sub, nil
}

// receive calls changed for every burst of messages until receiving fails, which
// ENOBUFS (messages were lost) makes it as well as the end of ctx.
func receive(ctx context.Context, sub *nl.NetlinkSocket, changed func()) error {
	stop := context.AfterFunc(ctx, sub.Close)
	defer stop()
	for {
		if err := wait(sub, 0); err != nil {
			return err
		}
		for end := time.Now().Add(settle); ; {
			left := time.Until(end)
			if left <= 0 {
				break
			}
			if err := wait(sub, left); errors.Is(err, unix.EAGAIN) {
				break
			} else if err != nil {
				return err
			}
		}
		changed()
	}
}

// wait receives one batch of messages; EAGAIN means that there was none within
// the timeout, of which zero is forever.
func wait(sub *nl.NetlinkSocket, timeout time.Duration) error {
	tv := unix.NsecToTimeval(timeout.Nanoseconds())
	if err := sub.SetReceiveTimeout(&tv); err != nil {
		return err
	}
	_, _, err := sub.Receive()
	return err
}

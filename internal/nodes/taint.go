package nodes

import (
	"context"
	"encoding/json"
	"fmt"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
)

// tainted is what a change of taints has to know of a Node. Taints stay as they were written.
type tainted struct {
	Metadata struct {
		ResourceVersion string `json:"resourceVersion"`
	} `json:"metadata"`
	Spec struct {
		Taints []json.RawMessage `json:"taints"`
	} `json:"spec"`
}

// LiftTaint removes the taints of a key from this node, and no other. It is fine if there is
// none. When somebody else changes the node meanwhile, it looks again.
func (c *Client) LiftTaint(ctx context.Context, key string) error {
	const tries = 5
	var err error
	for range tries {
		if err = c.liftTaint(ctx, key); !apierrors.IsConflict(err) {
			break
		}
	}
	if err != nil {
		return fmt.Errorf("node %s: lift taint %s: %s", c.name, key, brief(err))
	}
	return nil
}

func (c *Client) liftTaint(ctx context.Context, key string) error {
	data, err := c.rest.Get().Resource("nodes").Name(c.name).MaxRetries(0).
		SetHeader("Accept", runtime.ContentTypeJSON).Do(ctx).Raw()
	if err != nil {
		return err
	}
	var n tainted
	if err := json.Unmarshal(data, &n); err != nil {
		return err
	}
	kept := []json.RawMessage{}
	for _, raw := range n.Spec.Taints {
		var taint struct {
			Key string `json:"key"`
		}
		if err := json.Unmarshal(raw, &taint); err != nil {
			return err
		}
		if taint.Key != key {
			kept = append(kept, raw)
		}
	}
	if len(kept) == len(n.Spec.Taints) {
		return nil
	}
	// With the version that was read: the patch replaces the whole list.
	n.Spec.Taints = kept
	patch, err := json.Marshal(n)
	if err != nil {
		return err
	}
	return c.rest.Patch(types.MergePatchType).Resource("nodes").Name(c.name).MaxRetries(0).
		SetHeader("Accept", runtime.ContentTypeJSON).Body(patch).Do(ctx).Error()
}

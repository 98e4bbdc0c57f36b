"""Published numbers (Zhu et al., ICLR 2026), percent clean-test accuracy unless said otherwise, and what they were measured on."""

PAPER = {
    "CIFAR-10": {
        "setting": "CIFAR-10 (PNG), all 50,000 training images, source and victim ResNet-18, 100 epochs of generation, 200 of training, "
        "one run without spread",
        "victim": "resnet18",
        "train_images": 50000,
        "epochs": 200,
        "standard": {"clean": 94.45, "em": 24.17, "tap": 11.21, "mi-ue": 9.95},
        "adversarial": {2: 17.39, 4: 31.79, 6: 45.55, 8: 70.56},  # MI-UE, by 255 eps
        "mutual_information": {"clean": 0.7122, "random": 0.6747, "em": 0.64, "mi-ue": 0.4969},  # histogram estimator
        "spearman": 0.78,  # of the MI gap with the accuracy gap
    }
}
ORDER = ("clean", "random", "em", "mi-ue")  # the paper's, of mutual information and covariance, largest first


def differences(paper, report):
    """In words, why numbers of this report are not to be compared one to one with the paper's; empty: the setting is the same."""
    setting, found = report["setting"], []
    if setting["train_images"] != paper["train_images"]:
        found.append(f"{setting['train_images']:,} training images instead of {paper['train_images']:,}")
    if paper["victim"] not in setting["victims"]:
        found.append(f"victims {', '.join(setting['victims'])} instead of ResNet-18")
    elif (setting["victims"][paper["victim"]].get("epochs") or paper["epochs"]) != paper["epochs"]:
        found.append(f"{setting['victims'][paper['victim']]['epochs']} epochs instead of {paper['epochs']}")
    if "JPEG" in report["name"]:
        found.append("the images went through JPEG")
    return found
